"""Longest cached prefix first.

Source: SGLang (arXiv 2312.07104) and sgl-project/sglang; papers.md 4.2. Unlike there, a long queue
does not fall back to arrival order: the tree of waiting prompts makes a change of the cache cheap.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

from ..events import Abort, Admit, Arrive, Event, Finish, Preempt, RequestNumber, Takes
from ..waiting_tree import Rank, WaitingTree
from ..weighted_tree import WeightedTree

SomeTree = TypeVar("SomeTree", WaitingTree, WeightedTree)


class PrefixOrder(ABC, Generic[SomeTree]):
    """Base of orders by what of each prompt is cached; running requests stand by arrival.

    `tree` says how a match weighs against a rank, `rank` how requests with one match stand.
    """

    def __init__(self, tree: SomeTree):
        self._tree = tree
        self._arrivals: dict[RequestNumber, Arrive] = {}
        self._running: dict[RequestNumber, None] = {}
        self._takes: Takes = {
            Arrive: self._arrive,
            Admit: self._admit,
            Preempt: self._preempt,
            Finish: self._end,
            Abort: self._end,
            **tree.takes,
        }

    @abstractmethod
    def rank(self, event: Arrive) -> Rank:
        """Smallest first; the last part is the request's number."""

    def on(self, event: Event) -> None:
        take = self._takes.get(type(event))
        if take is not None:
            take(event)

    def next(self) -> RequestNumber | None:
        rank = self._tree.first()
        return None if rank is None else rank[-1]

    def waiting(self) -> Iterator[RequestNumber]:
        for rank in self._tree.ranks():
            yield rank[-1]

    def running(self) -> list[RequestNumber]:
        return sorted(self._running)

    def _arrive(self, event: Arrive) -> None:
        self._arrivals[event.number] = event
        self._tree.add(self.rank(event), event.page_keys, event.num_cached)

    def _admit(self, event: Admit) -> None:
        self._tree.remove(self.rank(self._arrivals[event.number]))
        self._running[event.number] = None

    def _preempt(self, event: Preempt) -> None:
        arrival = self._arrivals[event.number]
        del self._running[event.number]
        self._tree.add(self.rank(arrival), arrival.page_keys, event.num_cached)

    def _end(self, event: Finish | Abort) -> None:
        arrival = self._arrivals.pop(event.number)
        if event.number in self._running:
            del self._running[event.number]
        else:
            self._tree.remove(self.rank(arrival))


class Lpm(PrefixOrder[WaitingTree]):
    """Longest match first, ties by arrival. Starves whoever shares nothing with the others."""

    def __init__(self) -> None:
        super().__init__(WaitingTree())

    def rank(self, event: Arrive) -> Rank:
        return (event.number,)
