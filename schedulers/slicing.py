"""How long: the steps of the next slice, its quorum, and how many slices may be in flight.

A slicing knows step times and hazards only through what it is told; it reads no clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from .estimators.serving_time import UNMEASURED_S, ServingTime, SliceShape
from .parameters import positive, require


@dataclass(frozen=True, slots=True)
class SliceBounds:
    """What the engine allows: S, tokens of the longest context, the longest time that slices in
    flight may take (0: unbounded), whether two may be in flight, and seconds of a dispatch."""

    slice_steps: int
    max_context: int
    max_gap_s: float
    overlap: bool
    dispatch_s: float = UNMEASURED_S

    def __post_init__(self) -> None:
        positive("dispatch_s", self.dispatch_s)

    @property
    def depth(self) -> int:
        return 2 if self.overlap else 1


ENOUGH_SLICES: Final = 100
"""Measured slices from which on a prediction may refuse a request."""


@dataclass(slots=True)
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


@dataclass(slots=True)
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

    def choose(self, view: SlicingView) -> SliceLength:
        """The next slice."""
        ...

    def arrived(self, now_s: float) -> None:
        """A request came."""
        ...

    def ran(
        self, shape: SliceShape, *, slice_s: float, host_s: float, made: int, finished: int
    ) -> None:
        """A slice ran: its rows made so many tokens, and so many of them ended."""
        ...

    def predict_s(self, shape: SliceShape) -> float:
        """Seconds of a slice; 0 where too little was learnt to tell."""
        ...


class _Unlearning:
    """Base of the rules that learn nothing."""

    admits_while_running = True

    def arrived(self, now_s: float) -> None:
        pass

    def ran(
        self, shape: SliceShape, *, slice_s: float, host_s: float, made: int, finished: int
    ) -> None:
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


@dataclass(frozen=True, slots=True)
class AdaptiveParameters:
    """What is believed before anything was measured, and how slowly beliefs change.

    `host_s` is the host's work per slice, `hazard` the chance that a row ends with a token, which
    counts for as much as `prior_tokens` measured tokens. `memory` is what a slice leaves of the
    older belief in both, `arrival_memory` an arrival of that in the gap between arrivals,
    `forgetting` a slice of the weight of older ones in the model of serving time.
    """

    host_s: float = 1e-3
    hazard: float = 1e-2
    prior_tokens: float = 100.0
    memory: float = 0.95
    arrival_memory: float = 0.9
    forgetting: float = 0.995

    def __post_init__(self) -> None:
        for name in ("host_s", "prior_tokens"):
            positive(name, getattr(self, name))
        require(0 < self.hazard <= 1, "hazard", self.hazard, "a number in (0, 1]")
        for name in ("memory", "arrival_memory"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "a number in [0, 1)")
        forgetting = self.forgetting
        require(0.5 <= forgetting <= 1, "forgetting", forgetting, "a number in [0.5, 1]")


class Adaptive:
    """The length that loses least, in row-steps per step.

    A slice of S steps over B rows costs the host's work once, H steps' worth of time for B rows,
    and a dispatch's fixed cost on the device, F. What ends or arrives inside it waits for its end,
    S / 2 steps on average; with a second slice in flight it waits for that one too, but the host's
    work is hidden. With r such events per step, a step loses
        depth 1:  (H + F) B / S + r S / 2
        depth 2:  F B / S + 3 r S / 2      with S >= H
    The first is least at S = sqrt(2 (H + F) B / r). (What a step with prompts costs beyond their
    tokens would be saved, too, by slices that gather prompts. Weighed as the others are, on a
    modelled CPU at 30 to 110 % load it made first tokens 4 to 29 % later and answers up to 6 %, for
    less than 1 % of throughput.)
    Events are arrivals, estimated from their gaps, and, only when there is a backlog, rows that end
    (hazard per token): an idle row costs nothing that anybody waits for otherwise. With a backlog
    the slice may run to 2 S but ends once r S rows have ended, which is what S stands for. Prompts
    cut by the token budget make it one step: the next slice can take more of them at once.

    `max_gap_s` bounds the predicted time of what is in flight, and so both the delivery gap of
    running streams and the wait for admission; where not even two steps fit into it, one slice at
    a time is in flight.
    """

    admits_while_running = True

    def __init__(self, bounds: SliceBounds, parameters: AdaptiveParameters | None = None):
        self.max_steps = bounds.slice_steps
        self._bounds = bounds
        self._parameters = parameters or AdaptiveParameters()
        self._time = ServingTime(bounds.dispatch_s, forgetting=self._parameters.forgetting)
        self._num_ran = 0
        self._host_s = self._parameters.host_s
        # Tokens and ends of past slices, older ones counting less: their ratio is the hazard.
        self._made = self._parameters.prior_tokens
        self._ended = self._parameters.hazard * self._made
        self._arrival_gap_s = math.inf
        self._last_arrival_s = -math.inf

    def arrived(self, now_s: float) -> None:
        gap = now_s - self._last_arrival_s
        self._last_arrival_s = now_s
        if math.isfinite(gap):
            old, memory = self._arrival_gap_s, self._parameters.arrival_memory
            self._arrival_gap_s = gap if math.isinf(old) else memory * old + (1 - memory) * gap

    def ran(
        self, shape: SliceShape, *, slice_s: float, host_s: float, made: int, finished: int
    ) -> None:
        self._time.observe(shape, slice_s)
        self._num_ran += 1
        memory = self._parameters.memory
        self._host_s = memory * self._host_s + (1 - memory) * host_s
        if made:
            self._made = memory * self._made + made
            self._ended = memory * self._ended + finished

    def predict_s(self, shape: SliceShape) -> float:
        return self._time.predict_s(shape) if self._num_ran >= ENOUGH_SLICES else 0.0

    def choose(self, view: SlicingView) -> SliceLength:
        rows = len(view.remaining) or 1
        if view.cut_prompts:
            steps, depth = self._bounded(1.0, view, rows, self._bounds.depth)
            return SliceLength(steps, rows, depth)
        step_s = self._time.step_s(rows, view.context_tokens)
        if view.backlog:
            events = ends = rows * max(self._ended / self._made, 1e-6)
        else:
            ends, events = 0.0, self._arrivals_per_s(view.now_s) * step_s
        events = max(events, 1e-9)
        host, fixed = self._host_s / step_s, self._bounds.dispatch_s / step_s
        one, loss_one = least_loss(host + fixed, rows, events, waits=1, at_least=0.0)
        two, loss_two = least_loss(fixed, rows, events, waits=3, at_least=max(host, 1.0))
        depth = 2 if self._bounds.overlap and loss_two < loss_one else 1
        best = two if depth == 2 else one
        longest = max(view.remaining, default=1)
        quorum = rows
        if view.backlog:
            quorum, best = max(1, min(rows, round(ends * best))), 2 * best
        steps, depth = self._bounded(best, view, rows, depth)
        return SliceLength(min(longest, steps), quorum, depth)

    def _arrivals_per_s(self, now_s: float) -> float:
        """One over the mean gap; a silence longer than the mean gap counts as the gap."""
        gap = max(self._arrival_gap_s, now_s - self._last_arrival_s)
        return 1 / max(gap, 1e-6)

    def _shape(self, steps: int, view: SlicingView, rows: int) -> SliceShape:
        attended = steps * view.context_tokens + rows * steps * (steps + 1) // 2
        return SliceShape(steps, rows, attended, view.prefill_tokens)

    def _bounded(self, steps: float, view: SlicingView, rows: int, depth: int) -> tuple[int, int]:
        """Steps and depth within the gap: fewer steps first, then fewer slices in flight."""
        best, gap_s = max(1, min(self.max_steps, round(steps))), self._bounds.max_gap_s
        if not gap_s:
            return best, depth
        while (flight_s := depth * self._time.predict_s(self._shape(best, view, rows))) > gap_s:
            if best == 1:
                return 1, 1
            best = max(1, min(best - 1, int(best * gap_s / flight_s)))
        return best, depth


def least_loss(
    fixed: float, rows: int, events: float, *, waits: int, at_least: float
) -> tuple[float, float]:
    """The S with the least fixed rows / S + waits events S / 2, and that."""
    steps = max(math.sqrt(2 * rows * fixed / (waits * events)), at_least)
    return steps, fixed * rows / steps + waits * events * steps / 2
