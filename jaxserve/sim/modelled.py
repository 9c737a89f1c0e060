"""The `modelled` executor: virtual time from a model, tokens that say only whose they are.

Limits, ends and quorum are those of the slice program; how long each output is was told
beforehand, as the device's secret: no policy hears of it before the token that ends it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.clock import Clock
from jaxserve.engine.buckets import Buckets
from jaxserve.engine.plan import Code, RowStart, SlicePlan, SliceResult
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import SliceTime


@dataclass(slots=True)
class Outputs:
    """What samples will make, by their seed: where each ends (tokens of prompt and output), and its
    tokens where somebody cares."""

    end_length: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, Sequence[int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Row:
    """What the device holds of a row."""

    length: int
    end: int
    stops: bool  # it ends by itself, not at its limit
    token: int
    tokens: Sequence[int] | None
    prompt: int
    fresh: bool = True  # its first token comes from the prompt, without a decode step
    done: bool = False


_Live = tuple[int, _Row, int]
"""A row that makes tokens in a slice: its place in the plan, and how many it makes at most."""


@dataclass(slots=True, eq=False)
class ModelledSlice:
    """A ticket: the slice's result, and when the device begins it and is done with it."""

    result: SliceResult
    begin_s: float
    ready_s: float
    output_tokens: int


class ModelledExecutor:
    """Runs slices one after the other in virtual time.

    `wait` may be called once `clock` shows the slice's `ready_s`. Programs come in `buckets`, whose
    padding takes time as on a real device.
    """

    def __init__(
        self,
        time: SliceTime,
        outputs: Outputs,
        clock: Clock,
        *,
        buckets: Buckets,
        vocab_size: int,
    ):
        self._time, self._outputs, self._clock = time, outputs, clock
        self._buckets, self._vocab_size = buckets, vocab_size
        self._rows: dict[int, _Row] = {}
        self._busy_until_s = 0.0

    def dispatch(self, plan: SlicePlan) -> ModelledSlice:
        result, made = self._run(plan)
        begin_s = max(self._busy_until_s, self._clock.now())
        self._busy_until_s = begin_s + result.slice_s
        return ModelledSlice(result, begin_s, self._busy_until_s, made)

    def wait(self, ticket: ModelledSlice) -> SliceResult:
        assert self._clock.now() >= ticket.ready_s, "the slice is still running"
        return ticket.result

    def delay(self, seconds: float, tickets: Sequence[ModelledSlice]) -> None:
        """Something else runs on the device for so long: the slices in flight, given in order, are
        done later. The first of them is running."""
        self._busy_until_s += seconds
        for place, ticket in enumerate(tickets):
            ticket.ready_s += seconds
            if place:
                ticket.begin_s += seconds
            else:
                ticket.result.slice_s += seconds

    def _run(self, plan: SlicePlan) -> tuple[SliceResult, int]:
        """Its result, and how many tokens it made."""
        live: list[_Live] = []
        ends: list[int] = []
        chunk_tokens: list[int] = []
        chunk_attended = steps = 0
        state = self._rows
        for place, each in enumerate(plan.rows):
            chunk, start = each.chunk, each.start
            if chunk is not None:
                size = chunk.tokens.size
                chunk_tokens.append(size)
                chunk_attended += size * chunk.start + size * (size + 1) // 2
                if start is None:
                    continue
                state[each.slot] = self._started(start)
            row = state[each.slot]
            if row.done:
                continue
            most = each.cover - row.length + 1
            if most > each.steps:
                most = each.steps
            left = row.end - row.length
            if left <= most:
                most = left
                ends.append(left)
            live.append((place, row, most))
            if most > steps:
                steps = most
        if len(ends) >= plan.quorum:
            ends.sort()
            steps = min(steps, ends[plan.quorum - 1])
        steps_run = max(steps, 1)  # prompts alone are one step
        return self._result(plan, live, steps_run, chunk_tokens, chunk_attended)

    def _started(self, start: RowStart) -> _Row:
        length = start.prompt.size + len(start.made)
        end = self._outputs.end_length.get(start.seed, start.max_length)
        return _Row(
            length=length,
            end=min(end, start.max_length),
            stops=end < start.max_length,
            token=start.seed % self._vocab_size,
            tokens=self._outputs.tokens.get(start.seed),
            prompt=start.prompt.size,
        )

    def _result(
        self,
        plan: SlicePlan,
        live: list[_Live],
        steps_run: int,
        chunk_tokens: list[int],
        chunk_attended: int,
    ) -> tuple[SliceResult, int]:
        num_rows = len(plan.rows)
        codes: list[int] = [Code.RUNNING] * num_rows
        tokens: list[list[int]] = [[]] * num_rows  # nobody adds to them
        made = attended = 0
        for place, row, most in live:
            count = most if most < steps_run else steps_run
            length = row.length
            attended += count * length + count * (count - 1) // 2
            if row.fresh and count:
                attended -= length
                row.fresh = False
            if row.tokens is None:
                tokens[place] = [row.token] * count
            else:
                tokens[place] = list(row.tokens[length - row.prompt : length - row.prompt + count])
            row.length = length = length + count
            made += count
            if length >= row.end:
                row.done = True
                codes[place] = Code.STOP if row.stops else Code.LENGTH
        bucket = self._buckets.smallest(num_rows, chunk_tokens)
        rows_run, prefill_run = bucket.rows, bucket.tiles * self._buckets.tile
        shape = SliceShape(steps_run, rows_run, attended, prefill_run, chunk_attended)
        slice_s = self._time.slice_s(shape)
        result = SliceResult(plan.number, steps_run, tokens, codes, slice_s, rows_run, prefill_run)
        return result, made
