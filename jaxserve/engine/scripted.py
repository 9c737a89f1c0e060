"""Executors without a device: `mock` counts up, `paced` also takes the time a model predicts.

Their tokens can be worked out by hand: each is the one before plus 1, modulo the vocabulary, the
first following the prompt's last token. Limits, stop ids, minimum lengths and quorum are those of
the slice program, so the core, the server and their tests meet the real contract.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.buckets import Buckets
from jaxserve.engine.plan import Code, RowPlan, RowStart, SliceLogprobs, SlicePlan, SliceResult
from jaxserve.engine.slice_shape import slice_shape
from jaxserve.request import MAX_TOP_LOGPROBS
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import SliceTime


@dataclass(slots=True)
class _Row:
    start: RowStart
    token: int
    length: int
    done: bool = False


@dataclass(frozen=True, slots=True)
class Pace:
    """How long slices take: a model of time, and the programs that pad them."""

    time: SliceTime
    buckets: Buckets

    def shape(
        self, plan: SlicePlan, *, lengths: list[int], counts: list[int], steps_run: int
    ) -> SliceShape:
        """What a slice runs; see `slice_shape`."""
        chunks = [row.chunk.tokens.size for row in plan.rows if row.chunk is not None]
        bucket = self.buckets.smallest(len(plan.rows), chunks)
        return slice_shape(
            plan,
            lengths=lengths,
            counts=counts,
            steps_run=steps_run,
            rows_run=bucket.rows,
            prefill_run=bucket.tiles * self.buckets.tile,
        )


class ScriptedExecutor:
    """Tokens by rule. With a pace it sleeps so that slices follow each other as on a device."""

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        pace: Pace | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self._pace = pace
        self._now, self._sleep = now, sleep
        self._rows: dict[int, _Row] = {}
        self._busy_until_s = 0.0

    def dispatch(self, plan: SlicePlan) -> tuple[SliceResult, float]:
        result = self._run(plan)
        seconds = result.slice_s if self._pace else 0.0
        self._busy_until_s = max(self._busy_until_s, self._now()) + seconds
        return result, self._busy_until_s

    def wait(self, ticket: tuple[SliceResult, float]) -> SliceResult:
        result, ready_s = ticket
        if self._pace and ready_s > self._now():
            self._sleep(ready_s - self._now())
        return result

    def _run(self, plan: SlicePlan) -> SliceResult:
        num_rows = len(plan.rows)
        tokens: list[list[int]] = [[] for _ in plan.rows]
        codes: list[int] = [Code.RUNNING] * num_rows
        for plan_row in plan.rows:
            if plan_row.start is not None:
                start = plan_row.start
                last = start.made[-1] if start.made else int(start.prompt[-1])
                length = start.prompt.size + len(start.made)
                self._rows[plan_row.slot] = _Row(start, last, length)
        lengths = [self._length(row) for row in plan.rows]
        step = 0
        while step < plan.steps and num_rows - codes.count(Code.RUNNING) < plan.quorum:
            active = [b for b, row in enumerate(plan.rows) if self._active(row, len(tokens[b]))]
            if not active:
                break
            for b in active:
                row = self._rows[plan.rows[b].slot]
                token, codes[b] = self._step(row)
                tokens[b].append(token)
            step += 1
        steps_run = max(step, 1)  # prompts alone are one step
        slice_s, rows_run, prefill_run = 1e-3 * steps_run, num_rows, plan.num_prefill_tokens
        if self._pace is not None:
            counts = [len(made) for made in tokens]
            shape = self._pace.shape(plan, lengths=lengths, counts=counts, steps_run=steps_run)
            slice_s = self._pace.time.slice_s(shape)
            rows_run, prefill_run = shape.rows, shape.prefill_tokens
        return SliceResult(
            number=plan.number,
            steps_run=steps_run,
            tokens=tokens,
            codes=codes,
            slice_s=slice_s,
            rows_run=rows_run,
            prefill_run=prefill_run,
            logprobs=_even_logprobs(steps_run, num_rows, self._vocab_size),
        )

    def _length(self, plan_row: RowPlan) -> int:
        row = self._rows.get(plan_row.slot)
        return row.length if row is not None else 0  # in the middle of its prompt

    def _active(self, plan_row: RowPlan, count: int) -> bool:
        row = self._rows.get(plan_row.slot)
        if row is None or row.done or count >= plan_row.steps:
            return False
        return row.length <= plan_row.cover

    def _step(self, row: _Row) -> tuple[int, Code]:
        params, made = row.start.params, row.length - row.start.prompt.size
        eos = frozenset() if params.ignore_eos else self._eos
        stops = eos | frozenset(params.stop_token_ids)
        token = (row.token + 1) % self._vocab_size
        while made < params.min_tokens and token in stops:
            token = (token + 1) % self._vocab_size
        row.token, row.length = token, row.length + 1
        code = Code.RUNNING
        if token in stops:
            code = Code.STOP
        elif row.length >= row.start.max_length:
            code = Code.LENGTH
        row.done = code is not Code.RUNNING
        return token, code


def _even_logprobs(steps: int, rows: int, vocab_size: int) -> SliceLogprobs:
    """As if every token were equally likely."""
    even = np.float32(-np.log(vocab_size))
    top_ids = np.broadcast_to(
        np.arange(MAX_TOP_LOGPROBS, dtype=np.int32), (steps, rows, MAX_TOP_LOGPROBS)
    )
    top = np.full(top_ids.shape, even, np.float32)
    return SliceLogprobs(np.full((steps, rows), even, np.float32), top_ids, top)
