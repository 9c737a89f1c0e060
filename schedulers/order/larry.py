"""Response ratio in seconds: waiting time over the estimated time of the prefill.

Reconstruction. The paper (arXiv 2410.17840) gives the name and says that waiting time and load
enter the order; formula, clock and rate are ours, papers.md 2.3, and none of its results may be
claimed for it. A gate that prefers small KV needs while memory is short is left out: an order does
not hear how much is free.
"""

from dataclasses import dataclass
from typing import Literal

from ..events import Arrive, Enact, Tick
from ..parameters import positive
from .response_ratio import ResponseRatio


@dataclass(frozen=True, slots=True)
class LarryParameters:
    """`clock`: waiting is counted in seconds, or in prompt tokens that were computed meanwhile (as
    `hrrn`). `prefill_rate` estimates a prefill, in tokens per second, where the clock is time."""

    clock: Literal["time", "tokens"] = "time"
    prefill_rate: float = 8000.0

    def __post_init__(self) -> None:
        positive("prefill_rate", self.prefill_rate)


class Larry(ResponseRatio):
    """By 1 + waiting time / estimated prefill time (reconstruction).

    On the time clock a request is let in sooner or later if what others wait stays bounded: its
    ratio grows without limit. Where short prompts alone are more than the engine can serve, they
    too wait ever longer, and a prompt that is long enough starves.
    """

    def __init__(self, parameters: LarryParameters | None = None, *, page_size: int):
        super().__init__(page_size=page_size)
        self._parameters = parameters or LarryParameters()

    def came(self, event: Arrive) -> float:
        if self._parameters.clock == "tokens":
            return super().came(event)
        return event.arrived_s * self._parameters.prefill_rate

    def clock_after(self, event: Enact | Tick) -> float:
        if self._parameters.clock == "tokens":
            return super().clock_after(event)
        rate = self._parameters.prefill_rate
        return event.now_s * rate if isinstance(event, Tick) else self._clock
