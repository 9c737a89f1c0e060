"""What every order offers, and the base of those whose sorting key never changes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..events import Abort, Admit, Arrive, Event, Finish, Preempt, RequestNumber, Takes
from ..ranking import Ranking
from .charges import Prices

Key = tuple[int | float, ...]
"""What requests are sorted by, smallest first."""


@runtime_checkable
class Order(Protocol):
    """A total order over requests, kept up to date by events."""

    def on(self, event: Event) -> None:
        """Take note of what happened."""
        ...

    def next(self) -> RequestNumber | None:
        """Who is to be let in now. Asked while there is room for somebody: credits may be given
        out for it, so that it is no mere question. None, or one that was just called a misfit, ends
        the pass."""
        ...

    def waiting(self) -> Iterator[RequestNumber]:
        """Waiting requests, the next one first, as far as it is known. Changes nothing. Events end
        the iteration: ask anew."""
        ...

    def running(self) -> list[RequestNumber]:
        """Running requests, the one to serve first in front: victims are taken from the end."""
        ...


@runtime_checkable
class Refuses(Protocol):
    """An order that does not take every request."""

    def refuses(self, event: Arrive) -> str | None:
        """Why the deadline of a request that is about to arrive cannot be met; None if it can."""
        ...


@dataclass(slots=True)
class Extremes:
    """The largest of what was seen so far, in tokens; service bounds are made of it. Never changed
    once made; not frozen, which takes three times as long.

    `prompt` of one request, `extend` of one admission, `output` of one request, `refund` of one
    request that stopped before its prompt was run, with what it found cached if nothing was,
    `overrun` output of one that never counted. `rows` counts requests of one client that ran at
    once; `least_weight` is that of the clients that are compared.
    """

    prompt: int = 0
    extend: int = 0
    output: int = 0
    refund: int = 0
    overrun: int = 0
    rows: int = 0
    least_weight: float = 1.0


@runtime_checkable
class FairOrder(Order, Protocol):
    """An order that charges clients for service, in priced tokens."""

    @property
    def prices(self) -> Prices: ...

    def charged(self, client: str) -> float:
        """What a client that has requests was charged so far, less what was given back.

        A prompt counts from its admission on, whenever its charge falls due. Only differences of
        it mean something, and only while the client has requests.
        """
        ...

    def credit(self, client: str) -> float | None:
        """What the client may still be charged before it has to wait; below 0 it is overdrawn.
        None for clients that are not known, and in orders that give no credit."""
        ...

    def service_bound(self, seen: Extremes) -> float | None:
        """The most that two clients with requests waiting throughout can be charged apart, each by
        its weight, over any interval so far. None where nothing is promised."""
        ...


class StaticOrder(ABC):
    """An order by a key that is fixed on arrival, so a preempted request takes its old place."""

    def __init__(self) -> None:
        self._key: dict[RequestNumber, Key] = {}
        self._waiting: Ranking[Key, RequestNumber] = Ranking()
        self._running: dict[Key, RequestNumber] = {}
        self._sorted: list[RequestNumber] | None = None  # who runs, until somebody else does
        self._takes: Takes = {
            Arrive: self._arrive,
            Admit: self._admit,
            Preempt: self._preempt,
            Finish: self._end,
            Abort: self._end,
        }

    @abstractmethod
    def key(self, event: Arrive) -> Key:
        """The sorting key of a request, smallest first."""

    def on(self, event: Event) -> None:
        take = self._takes.get(type(event))
        if take is not None:
            take(event)

    def next(self) -> RequestNumber | None:
        return self._waiting[self._waiting.least()] if self._waiting else None

    def waiting(self) -> Iterator[RequestNumber]:
        return map(self._waiting.__getitem__, self._waiting.ascending())

    def running(self) -> list[RequestNumber]:
        if self._sorted is None:
            self._sorted = [self._running[key] for key in sorted(self._running)]
        return list(self._sorted)

    def _arrive(self, event: Arrive) -> None:
        number = event.number
        key = self._key[number] = (*self.key(event), number)
        self._waiting.put(key, number)

    def _admit(self, event: Admit) -> None:
        key = self._key[event.number]
        self._running[key] = self._waiting.pop(key)
        self._sorted = None

    def _preempt(self, event: Preempt) -> None:
        key = self._key[event.number]
        self._waiting.put(key, self._running.pop(key))
        self._sorted = None

    def _end(self, event: Finish | Abort) -> None:
        key = self._key.pop(event.number)
        if self._waiting.pop(key, None) is None:
            del self._running[key]
            self._sorted = None
