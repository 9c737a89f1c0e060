"""What every order offers, and the base of those whose sorting key never changes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from sortedcontainers import SortedDict

from ..events import Abort, Admit, Arrive, Event, Finish, Preempt, RequestNumber

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


class StaticOrder(ABC):
    """An order by a key that is fixed on arrival, so a preempted request takes its old place."""

    def __init__(self) -> None:
        self._key: dict[RequestNumber, Key] = {}
        self._waiting: SortedDict = SortedDict()
        self._running: SortedDict = SortedDict()

    @abstractmethod
    def key(self, event: Arrive) -> Key:
        """The sorting key of a request, smallest first."""

    def on(self, event: Event) -> None:
        match event:
            case Arrive(number=number):
                key = self._key[number] = (*self.key(event), number)
                self._waiting[key] = number
            case Admit(number=number):
                key = self._key[number]
                del self._waiting[key]
                self._running[key] = number
            case Preempt(number=number):
                key = self._key[number]
                del self._running[key]
                self._waiting[key] = number
            case Finish(number=number) | Abort(number=number):
                key = self._key.pop(number)
                if self._waiting.pop(key, None) is None:
                    del self._running[key]
            case _:
                pass

    def next(self) -> RequestNumber | None:
        return next(self.waiting(), None)

    def waiting(self) -> Iterator[RequestNumber]:
        return iter(self._waiting.values())

    def running(self) -> list[RequestNumber]:
        return list(self._running.values())
