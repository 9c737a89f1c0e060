"""How long: the steps of the next slice, its quorum, and how many slices may be in flight.

A slicing knows step times and hazards only through what it is told; it reads no clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from .estimators.serving_time import ServingTime, SliceShape

ENOUGH_SLICES: Final = 100
"""Measured slices from which on a prediction may refuse a request."""


@dataclass(frozen=True, slots=True)
class SlicingView:
    """What the next slice would hold.

    `remaining` is the most tokens each decoding row may still make. `backlog` says that work waits
    which a row's end would let in; a queue that could not be admitted anyway is no backlog.
    `cut_prompts` says that only the token budget keeps prompts from being run at once.
    `context_tokens` sums the rows' contexts.
    """

    now_s: float
    remaining: Sequence[int]
    context_tokens: int
    prefill_tokens: int
    backlog: bool
    cut_prompts: bool


@dataclass(frozen=True, slots=True)
class SliceLength:
    """At most `steps` steps; the slice ends early when `quorum` rows are done. `depth` is how many
    slices may be in flight: 2 hides the host's work, 1 lets finished rows be replaced sooner."""

    steps: int
    quorum: int
    depth: int


@runtime_checkable
class Slicing(Protocol):
    """One rule. `max_steps` sizes the device's step buffer."""

    max_steps: int
    admits_while_running: bool

    def choose(self, view: SlicingView) -> SliceLength: ...

    def arrived(self, now_s: float) -> None: ...

    def ran(self, shape: SliceShape, *, slice_s: float, host_s: float, finished: int) -> None: ...

    def predict_s(self, shape: SliceShape) -> float:
        """Seconds of a slice; 0 where too little was learnt to tell."""
        ...


class _Unlearning:
    """Base of the rules that learn nothing."""

    admits_while_running = True

    def arrived(self, now_s: float) -> None:
        pass

    def ran(self, shape: SliceShape, *, slice_s: float, host_s: float, finished: int) -> None:
        pass

    def predict_s(self, shape: SliceShape) -> float:
        return 0.0


class Fixed(_Unlearning):
    """S steps, always. `Fixed(1)` is iteration-level scheduling."""

    def __init__(self, steps: int, *, depth: int):
        self.max_steps = steps
        self._depth = depth

    def choose(self, view: SlicingView) -> SliceLength:
        return SliceLength(self.max_steps, max(1, len(view.remaining)), self._depth)


class WholeSequence(_Unlearning):
    """Sequence-level scheduling (SLS): a batch runs until all its members end, then the next."""

    admits_while_running = False

    def __init__(self, max_context: int):
        self.max_steps = max_context

    def choose(self, view: SlicingView) -> SliceLength:
        return SliceLength(max(view.remaining, default=1), max(1, len(view.remaining)), 1)


class Adaptive:
    """The length that loses least, in row-steps per step.

    A slice of S steps over B rows costs the host's work once, H steps' worth of time for B rows.
    What ends or arrives inside it waits for its end, S / 2 steps on average; with a second slice in
    flight it waits for that one too, but the host's work is hidden. With r such events per step
        depth 1:  (H B + r S^2 / 2) / S      least at S = sqrt(2 H B / r)
        depth 2:  (F B + 3 r S^2 / 2) / S    least at S = sqrt(2 F B / (3 r)), and S >= H
    where F is the fixed cost of a dispatch on the device. Events are arrivals, estimated from their
    gaps, and, only when there is a backlog, rows that end (hazard per row and step): an idle row
    costs nothing that anybody waits for otherwise. With a backlog the slice may run to 2 S but ends
    once r S rows have ended, which is what S stands for. Prompts cut by the token budget make it
    one step: the next slice can take more of them at once.

    `max_gap_s` bounds the predicted time of what is in flight, and so both the delivery gap of
    running streams and the wait for admission.
    """

    admits_while_running = True
    _memory = 0.95

    def __init__(self, max_steps: int, *, max_gap_s: float, overlap: bool, time: ServingTime):
        self.max_steps = max_steps
        self._max_gap_s = max_gap_s
        self._overlap = overlap
        self._time = time
        self._host_s = 1e-3
        self._hazard = 1e-2
        self._arrival_gap_s = math.inf
        self._last_arrival_s = -math.inf

    def arrived(self, now_s: float) -> None:
        gap = now_s - self._last_arrival_s
        self._last_arrival_s = now_s
        if math.isfinite(gap):
            old = self._arrival_gap_s
            self._arrival_gap_s = gap if math.isinf(old) else 0.9 * old + 0.1 * gap

    def ran(self, shape: SliceShape, *, slice_s: float, host_s: float, finished: int) -> None:
        self._time.observe(shape, slice_s)
        m = self._memory
        self._host_s = m * self._host_s + (1 - m) * host_s
        if shape.steps and shape.rows:
            self._hazard = m * self._hazard + (1 - m) * finished / (shape.steps * shape.rows)

    def predict_s(self, shape: SliceShape) -> float:
        return self._time.predict_s(shape) if self._time.num_observed >= ENOUGH_SLICES else 0.0

    def choose(self, view: SlicingView) -> SliceLength:
        rows = max(1, len(view.remaining))
        if view.cut_prompts:
            return SliceLength(1, rows, 2 if self._overlap else 1)
        step_s, fixed_s = self._step_s(view, rows)
        ends = rows * max(self._hazard, 1e-6) if view.backlog else 0.0
        events = ends + (0.0 if view.backlog else self._arrivals_per_s(view.now_s) * step_s)
        events = max(events, 1e-9)
        host, fixed = self._host_s / step_s, fixed_s / step_s
        one = math.sqrt(2 * (host + fixed) * rows / events)
        loss_one = (host + fixed) * rows / one + events * one / 2
        two = max(host, math.sqrt(2 * fixed * rows / (3 * events)), 1.0)
        loss_two = fixed * rows / two + 1.5 * events * two
        depth = 2 if self._overlap and loss_two < loss_one else 1
        best = two if depth == 2 else one
        longest = max(view.remaining, default=1)
        if not view.backlog:
            return SliceLength(min(longest, self._bounded(best, view, rows, depth)), rows, depth)
        quorum = max(1, min(rows, round(ends * best)))
        steps = min(longest, self._bounded(2 * best, view, rows, depth))
        return SliceLength(steps, quorum, depth)

    def _arrivals_per_s(self, now_s: float) -> float:
        """One over the mean gap; a silence longer than the mean gap counts as the gap."""
        gap = max(self._arrival_gap_s, now_s - self._last_arrival_s)
        return 1 / max(gap, 1e-6)

    def _shape(self, steps: int, view: SlicingView, rows: int) -> SliceShape:
        attended = steps * view.context_tokens + rows * steps * (steps + 1) // 2
        return SliceShape(steps, rows, attended, view.prefill_tokens)

    def _step_s(self, view: SlicingView, rows: int) -> tuple[float, float]:
        """Predicted seconds of a step, and of a slice beyond its steps."""
        one, two = (
            self._time.predict_s(SliceShape(steps, rows, steps * view.context_tokens, 0))
            for steps in (1, 2)
        )
        step_s = max(two - one, 1e-6)
        return step_s, max(one - step_s, 1e-5)

    def _bounded(self, steps: float, view: SlicingView, rows: int, depth: int) -> int:
        best = max(1, min(self.max_steps, round(steps)))
        if self._max_gap_s:
            while best > 1:
                seconds = self._time.predict_s(self._shape(best, view, rows))
                if seconds * depth <= self._max_gap_s:
                    break
                best = max(1, min(best - 1, int(best * self._max_gap_s / (seconds * depth))))
        return best
