"""Time as an argument: a real clock for serving, a virtual one for tests and the simulator."""

import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """Seconds since an arbitrary start; never goes back."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


@dataclass
class VirtualClock:
    """A clock that moves only when told to."""

    t: float = 0.0

    def now(self) -> float:
        return self.t

    def advance(self, dt_s: float) -> None:
        if dt_s < 0:
            raise ValueError(f"dt_s must not be negative, got {dt_s}")
        self.t += dt_s
