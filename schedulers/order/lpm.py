"""Longest cached prefix first.

Source: SGLang (arXiv 2312.07104) and sgl-project/sglang; papers.md 4.2. Unlike there, a long queue
does not fall back to arrival order: the tree of waiting prompts makes a change of the cache cheap.
Sharing inside a pass looks at prompts as they are let in, there at the whole queue in advance.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..events import (
    Abort,
    Admit,
    Arrive,
    Event,
    Finish,
    Preempt,
    RequestNumber,
    Takes,
    Tick,
)
from ..parameters import require
from ..prompt_tree import Node
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


@dataclass(frozen=True, slots=True)
class LpmParameters:
    """`in_batch_sharing`: of requests that share their first so many tokens, and do not find all of
    those cached, one is let in; the others go to the end of that pass, so that one prefill fills
    the cache for all. 0 is off."""

    in_batch_sharing: int = 32

    def __post_init__(self) -> None:
        require(
            self.in_batch_sharing >= 0,
            "in_batch_sharing",
            self.in_batch_sharing,
            "0 or more tokens",
        )


class Lpm(PrefixOrder[WaitingTree]):
    """Longest match first, ties by arrival. Starves whoever shares nothing with the others.

    Who shares the first tokens is told by a page key, because a key stands for all pages up to its
    own: so those that wait for one prefill are a branch of the tree, and are passed over in one.
    """

    def __init__(self, parameters: LpmParameters | None = None, *, page_size: int):
        super().__init__(WaitingTree())
        tokens = (parameters or LpmParameters()).in_batch_sharing
        self._shared_page = -(-tokens // page_size) - 1  # the last that is shared; -1: off
        self._let_in: set[bytes] = set()  # its keys, in this pass
        self._takes = {**self._takes, Tick: self._tick}

    def rank(self, event: Arrive) -> Rank:
        return (event.number,)

    def next(self) -> RequestNumber | None:
        if not self._let_in:
            return super().next()
        rank = self._tree.first_beside(self._is_passed)
        return super().next() if rank is None else rank[-1]

    def waiting(self) -> Iterator[RequestNumber]:
        if not self._let_in:
            yield from super().waiting()
            return
        deferred: list[RequestNumber] = []
        for number in super().waiting():
            if self._is_deferred(number):
                deferred.append(number)
            else:
                yield number
        yield from deferred

    def _tick(self, event: Tick) -> None:
        self._let_in.clear()

    def _admit(self, event: Admit) -> None:
        arrival = self._arrivals[event.number]
        if self._is_cold(arrival):
            self._let_in.add(arrival.page_keys[self._shared_page])
        super()._admit(event)

    def _is_cold(self, arrival: Arrive) -> bool:
        """Whether others could wait for its prefill."""
        if not 0 <= self._shared_page < len(arrival.page_keys):
            return False
        return self._tree.match(self.rank(arrival)) <= self._shared_page

    def _is_deferred(self, number: RequestNumber) -> bool:
        arrival = self._arrivals[number]
        return self._is_cold(arrival) and arrival.page_keys[self._shared_page] in self._let_in

    def _is_passed(self, node: Node) -> bool:
        """Whether all requests at and below a node wait for one prefill."""
        place = self._shared_page - node.start
        if not 0 <= place < len(node.run) or node.run[place] not in self._let_in:
            return False
        return node.cached <= place
