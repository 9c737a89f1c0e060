"""SCLS, and the ladder of steps that leads to it; the pool is planned as a whole, now and then.

Published (arXiv 2406.13511): slices of a bounded length, one a dispatch; batching by dynamic
programming; max-min offloading; an adaptive interval. Reconstruction: everything below that level,
the steps' names and all constants (papers.md 1.4 to 1.10).

| step | order | batches | instance | interval |
| so | arrival | fixed B | round robin | gamma |
| pm | length | fixed B | round robin | gamma |
| ab | length | dynamic programming | round robin | gamma |
| lb | length | dynamic programming | max-min | max(lambda * least load, gamma), and wake-ups |

Base form: KV is dropped after each slice and all tokens are computed again, so that any instance
may run the next slice. B is the most rows that fit with the longest request of the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..parameters import at_least, not_negative, require
from .batching import cheapest_cuts, of_slice
from .memory_rule import MemoryRule, Unit
from .offload import max_min
from .planner import BasePlanner, PoolSetup
from .request import Batch, PoolRequest

Step = Literal["so", "pm", "ab", "lb"]


def by_arrival(request: PoolRequest) -> tuple[int | float, ...]:
    return (request.arrival_s, request.number)


def by_length(request: PoolRequest) -> tuple[int | float, ...]:
    return (request.length, request.arrival_s, request.number)


@dataclass(frozen=True, slots=True)
class SclsParameters:
    """`batch_size` 0: B as memory allows. `interval_gamma_s` 0: one slice of one request of the
    pool's mean length. `most_planned` 0: the whole pool, else its oldest requests. `wake`: plan at
    once when an instance is idle (step lb). `refine`: learn from slices that ran."""

    step: Step = "lb"
    zeta: float = 0.9
    memory: Unit = "tokens"
    batch_size: int = 0
    interval_lambda: float = 0.5
    interval_gamma_s: float = 0.0
    wake: bool = True
    most_planned: int = 0
    refine: bool = False

    def __post_init__(self) -> None:
        require(0 < self.zeta <= 1, "zeta", self.zeta, "a number in (0, 1]")
        at_least("batch_size", self.batch_size, 0)
        not_negative("interval_lambda", self.interval_lambda)
        not_negative("interval_gamma_s", self.interval_gamma_s)
        at_least("most_planned", self.most_planned, 0)


class Scls(BasePlanner):
    """All steps, and what `static` shares with them."""

    def __init__(self, parameters: SclsParameters, setup: PoolSetup, *, slice_len: int = 0):
        """`slice_len` 0: that of the setup."""
        rule = MemoryRule.share(setup.memory, parameters.zeta, parameters.memory, setup.max_rows)
        slice_len = slice_len or setup.slice_len
        super().__init__(setup, rule, slice_len=slice_len, refine=parameters.refine)
        self._parameters = parameters
        self._next_s = 0.0
        self._turn = 0

    def due_s(self, now_s: float) -> float | None:
        if not self._pool:
            return None
        wakes = self._parameters.wake and self._parameters.step == "lb"
        if wakes and self._loads.idle():
            return now_s
        return max(now_s, self._next_s)

    def plan(self, now_s: float) -> list[Batch]:
        step = self._parameters.step
        order = by_arrival if step == "so" else by_length
        requests = sorted(self._chosen(), key=order)
        if not requests:
            return []
        groups = self._fixed(requests) if step in ("so", "pm") else self._cheapest(requests)
        estimates = [self._estimate_s(group) for group in groups]
        if step == "lb":
            instances = max_min(estimates, self._loads.seconds())
        else:
            instances = self._in_turn(len(groups))
        batches = [
            self._dispatch(
                instance, group, steps=self._steps(group), estimate_s=estimate_s, prefills=group
            )
            for group, estimate_s, instance in zip(groups, estimates, instances, strict=True)
        ]
        self._next_s = now_s + self._interval_s(requests)
        return batches

    def _chosen(self) -> Sequence[PoolRequest]:
        """Whom to plan: all, or the oldest."""
        most = self._parameters.most_planned
        if not most or len(self._pool) <= most:
            return list(self._pool.values())
        return sorted(self._pool.values(), key=by_arrival)[:most]

    def _fixed(self, requests: Sequence[PoolRequest]) -> list[Sequence[PoolRequest]]:
        size = self._batch_size(requests)
        return [requests[begin : begin + size] for begin in range(0, len(requests), size)]

    def _batch_size(self, requests: Sequence[PoolRequest]) -> int:
        longest = max(request.length for request in requests)
        fitting = int(self._rule.rows(np.array([longest]), self._slice_len)[0])
        return min(self._parameters.batch_size or fitting, fitting)

    def _cheapest(self, requests: Sequence[PoolRequest]) -> list[Sequence[PoolRequest]]:
        lengths = np.array([request.length for request in requests])
        most_rows = self._rule.rows(lengths, self._slice_len)
        ends = cheapest_cuts(lengths, most_rows, of_slice(self.time, self._slice_len))
        return [requests[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def _in_turn(self, count: int) -> list[int]:
        first, self._turn = self._turn, (self._turn + count) % len(self._loads)
        return [(first + place) % len(self._loads) for place in range(count)]

    def _steps(self, group: Sequence[PoolRequest]) -> int:
        """Of a dispatch: a slice, or what is left of the limits of all."""
        return min(self._slice_len, max(request.max_output - request.made for request in group))

    def _estimate_s(self, group: Sequence[PoolRequest]) -> float:
        length = max(request.length for request in group)
        return self.time.slice_s(len(group), length, self._slice_len)

    def _interval_s(self, requests: Sequence[PoolRequest]) -> float:
        gamma_s = self._parameters.interval_gamma_s
        if not gamma_s:
            mean = round(sum(request.length for request in requests) / len(requests))
            gamma_s = self.time.slice_s(1, mean, self._setup.slice_len)
        if self._parameters.step != "lb":
            return gamma_s
        return max(self._parameters.interval_lambda * self._loads.least_s, gamma_s)
