"""Virtual time: what happens next. Knows nothing of what it is that happens."""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any


class Agenda:
    """Actions at times, in seconds; those of one time happen in the order in which they were put
    down. It is the clock of a simulation: time is that of the action that happens.

    `horizon_s` is when something may happen that is not down here.
    """

    def __init__(self) -> None:
        self.horizon_s = math.inf
        self._now_s = 0.0
        self._entries: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()

    def now(self) -> float:
        return self._now_s

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Let `action(*arguments)` happen at a time that is not past."""
        assert time_s >= self._now_s, (time_s, self._now_s)
        heapq.heappush(self._entries, (time_s, next(self._count), action, arguments))

    def reaches(self, time_s: float) -> bool:
        """Whether it is that time, or nothing else happens up to it; then it is that time now, and
        who asked may go on at once."""
        if time_s <= self._now_s:
            return True
        if time_s >= self.horizon_s or (self._entries and self._entries[0][0] <= time_s):
            return False
        self._now_s = time_s
        return True

    def advance(self, time_s: float) -> None:
        """Let time pass to before anything else happens."""
        assert self._now_s <= time_s, (self._now_s, time_s)
        self._now_s = time_s

    def run(self, most: int) -> int:
        """Let things happen before the horizon, at most so many; how many did."""
        entries = self._entries
        for happened in range(most):
            if not entries or entries[0][0] >= self.horizon_s:
                return happened
            self._now_s, _, action, arguments = heapq.heappop(entries)
            action(*arguments)
        return most
