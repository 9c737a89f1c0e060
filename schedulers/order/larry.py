"""Response ratio in seconds: waiting time over the estimated time of the prefill.

Reconstruction. The paper (arXiv 2410.17840) gives the name and says that waiting time and load
enter the order; formula, clock, the estimate and the gate on free memory are ours, papers.md 2.3,
and none of its results may be claimed for it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..events import Arrive, Enact, RequestNumber, Tick
from ..parameters import not_negative, positive, require
from .response_ratio import ResponseRatio


@dataclass(frozen=True, slots=True)
class LarryParameters:
    """A prefill is estimated at `prefill_s` seconds, whatever its length, and one more for every
    `prefill_rate` uncached tokens.

    The larger the fixed part, the less a prompt's length counts beside its wait. Its default is the
    one in Preble's linear model of prefills, 4.2 ms (papers.md 4.5). With 0 who has nothing to
    compute goes first.

    `clock`: waiting is counted in seconds, or in prompt tokens that were computed meanwhile. There
    the fixed part stands for the tokens that could be computed in it, `prefill_s * prefill_rate`;
    with 0 that is `hrrn`.

    While less than the share `kv_gate` of the KV pool is free, smaller needs go first; 0 is never.
    """

    clock: Literal["time", "tokens"] = "time"
    prefill_s: float = 0.004
    prefill_rate: float = 8000.0
    kv_gate: float = 0.0

    def __post_init__(self) -> None:
        not_negative("prefill_s", self.prefill_s)
        positive("prefill_rate", self.prefill_rate)
        require(0 <= self.kv_gate <= 1, "kv_gate", self.kv_gate, "a number in [0, 1]")

    @property
    def fixed_tokens(self) -> float:
        """What could be computed in the fixed part of a prefill, in tokens."""
        return self.prefill_s * self.prefill_rate


class Larry(ResponseRatio):
    """By 1 + waiting time / estimated prefill time (reconstruction).

    On the time clock a request is let in sooner or later if what others wait stays bounded: its
    ratio grows without limit. Where short prompts alone are more than the engine can serve, they
    too wait ever longer, and a prompt that is long enough starves.

    While memory is short, as the last tick told, those who wait stand by KV need, smallest first,
    ties by arrival: a prompt's tokens, cached or not, with what was made before a preemption. Then
    waiting counts for nothing, and a large prompt waits until memory is free again or the small
    ones are gone. Who runs gives way by ratio all the same.
    """

    def __init__(self, parameters: LarryParameters | None = None, *, page_size: int):
        self._parameters = parameters or LarryParameters()
        self._is_short = False
        super().__init__(page_size=page_size, fixed_tokens=self._parameters.fixed_tokens)

    def came(self, event: Arrive) -> float:
        if self._parameters.clock == "tokens":
            return super().came(event)
        return event.arrived_s * self._parameters.prefill_rate

    def clock_after(self, event: Enact | Tick) -> float:
        if self._parameters.clock == "tokens":
            return super().clock_after(event)
        rate = self._parameters.prefill_rate
        return event.now_s * rate if isinstance(event, Tick) else self._clock

    def ranks(self) -> np.ndarray:
        return self._waiting.tokens if self._is_short else super().ranks()

    def rank(self, number: RequestNumber) -> float:
        if self._is_short:
            return float(self._requests[number].num_tokens)
        return super().rank(number)

    def _tick(self, event: Tick) -> None:
        is_short = event.free_share < self._parameters.kv_gate
        if is_short != self._is_short:
            self._is_short = is_short
            self._forget()
        super()._tick(event)
