"""What every order offers, and the base of those whose sorting key never changes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from ..events import Abort, Admit, Arrive, Event, Finish, Preempt, RequestNumber
from ..ranking import Ranking

Key = tuple[int | float, ...]
"""What requests are sorted by, smallest first."""

Takes = Mapping[type, Callable[[Any], None]]
"""What an order does about events, by their class: a slice brings hundreds, and asking for one
class after the other takes longer than what most orders do then."""


@runtime_checkable
class Order(Protocol):
    """A total order over requests, kept up to date by events."""

    def on(self, event: Event) -> None:
        """Take note of what happened."""
        ...

    def next(self) -> RequestNumber | None:
        """Who is to be let in now. Asked while there is room for somebody: credits may be given
        out for it, so that it is no mere question."""
        ...

    def waiting(self) -> Iterator[RequestNumber]:
        """Waiting requests, the next one first, as far as it is known. Changes nothing. Events end
        the iteration: ask anew."""
        ...

    def running(self) -> list[RequestNumber]:
        """Running requests, the one to serve first in front: victims are taken from the end."""
        ...


class StaticOrder(ABC):
    """An order by a key that is fixed on arrival, so a preempted request takes its old place."""

    def __init__(self) -> None:
        self._key: dict[RequestNumber, Key] = {}
        self._waiting: Ranking[Key, RequestNumber] = Ranking()
        self._running: Ranking[Key, RequestNumber] = Ranking()
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
        return [self._running[key] for key in self._running.ascending()]

    def _arrive(self, event: Arrive) -> None:
        number = event.number
        key = self._key[number] = (*self.key(event), number)
        self._waiting.put(key, number)

    def _admit(self, event: Admit) -> None:
        key = self._key[event.number]
        self._running.put(key, self._waiting.pop(key))

    def _preempt(self, event: Preempt) -> None:
        key = self._key[event.number]
        self._waiting.put(key, self._running.pop(key))

    def _end(self, event: Finish | Abort) -> None:
        key = self._key.pop(event.number)
        if self._waiting.pop(key, None) is None:
            del self._running[key]
