"""Virtual time: what happens next. Knows nothing of what it is that happens."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Agenda:
    """Actions at times, in seconds; those of one time happen in the order in which they were put
    down. It is the clock of a simulation: time is that of the action that happens."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._entries: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()

    def now(self) -> float:
        return self._now_s

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Let `action(*arguments)` happen at a time that is not past."""
        assert time_s >= self._now_s, (time_s, self._now_s)
        heapq.heappush(self._entries, (time_s, next(self._count), action, arguments))

    def next_s(self) -> float | None:
        """When something happens next; None: never."""
        return self._entries[0][0] if self._entries else None

    def advance(self, time_s: float) -> None:
        """Let time pass to before anything else happens."""
        assert self._now_s <= time_s, (self._now_s, time_s)
        self._now_s = time_s

    def step(self) -> None:
        """Let the next thing happen."""
        self._now_s, _, action, arguments = heapq.heappop(self._entries)
        action(*arguments)
