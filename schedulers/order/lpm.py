"""Longest cached prefix first.

Source: SGLang (arXiv 2312.07104) and sgl-project/sglang; papers.md 4.2. Unlike there, a long queue
does not fall back to arrival order: the tree of waiting prompts makes a change of the cache cheap.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

from ..events import Abort, Admit, Arrive, Event, Finish, Preempt, RequestNumber
from ..prefix_tree import Cleared, Removed, Stored
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

    @abstractmethod
    def rank(self, event: Arrive) -> Rank:
        """Smallest first; the last part is the request's number."""

    def on(self, event: Event) -> None:
        match event:
            case Arrive():
                self._arrivals[event.number] = event
                self._tree.add(self.rank(event), event.page_keys, event.num_cached)
            case Admit(number=number):
                self._tree.remove(self.rank(self._arrivals[number]))
                self._running[number] = None
            case Preempt(number=number, num_cached=num_cached):
                arrival = self._arrivals[number]
                del self._running[number]
                self._tree.add(self.rank(arrival), arrival.page_keys, num_cached)
            case Finish(number=number) | Abort(number=number):
                arrival = self._arrivals.pop(number)
                if number in self._running:
                    del self._running[number]
                else:
                    self._tree.remove(self.rank(arrival))
            case Stored() | Removed() | Cleared():
                self._tree.on(event)
            case _:
                pass

    def next(self) -> RequestNumber | None:
        rank = self._tree.first()
        return None if rank is None else rank[-1]

    def waiting(self) -> Iterator[RequestNumber]:
        for rank in self._tree.ranks():
            yield rank[-1]

    def running(self) -> list[RequestNumber]:
        return sorted(self._running)


class Lpm(PrefixOrder[WaitingTree]):
    """Longest match first, ties by arrival. Starves whoever shares nothing with the others."""

    def __init__(self) -> None:
        super().__init__(WaitingTree())

    def rank(self, event: Arrive) -> Rank:
        return (event.number,)
