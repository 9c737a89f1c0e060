"""Measures slices: made-up plans through a real executor, in an order that noise cannot favour.

Every program gets slices of its own: rows and prompts that it, and no smaller one, would be taken
for, at random lengths. A round runs all of them once, shuffled, and a point's time is the median of
its rounds: what slows the machine down for a while slows a bit of everything. The first round is
dropped. Knows no server and no fit.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from jaxserve.engine.buckets import Bucket
from jaxserve.engine.executor import Executor
from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan, SliceResult
from jaxserve.engine.slice_shape import slice_shape
from jaxserve.request import SamplingParams
from jaxserve.schedulers.estimators.fitted_time import Measured
from jaxserve.schedulers.estimators.serving_time import SliceShape

MOST_STEPS: Final = 16
"""Longer slices only take longer to measure: a slice's time is a sum over its steps."""

GREEDY: Final = SamplingParams(temperature=0.0, ignore_eos=True)
"""No row ends before its slice does."""

LEAST_ROUNDS: Final = 3
_LINE_EVERY_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the executor was compiled for."""

    buckets: tuple[Bucket, ...]
    tile: int
    max_rows: int
    max_steps: int
    max_context: int
    page_size: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Point:
    """One slice to measure: `contexts` are the tokens of each decoding row, `chunks` the start and
    size of prompts that end in it and decode on."""

    steps: int
    contexts: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest row before its first decode step."""
        return max((*self.contexts, *(start + size for start, size in self.chunks)))


@dataclass(slots=True)
class Measurement:
    """A point, what it ran as, and the seconds of each round."""

    point: Point
    shape: SliceShape
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def measured(self) -> Measured:
        return self.shape, self.median_s


class SliceBench:
    """Runs points on an executor whose rows it has to itself.

    With `busy`, a clock that stands still while others have the device, a slice's seconds are read
    from it instead of the executor. Rows are sampled by `params`, each with a seed of its own;
    `made` are the tokens of the newest slice, row by row.
    """

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        *,
        busy: Callable[[], float] | None = None,
        params: SamplingParams = GREEDY,
    ):
        self._executor, self.limits, self._busy, self._params = executor, limits, busy, params
        self.made: list[list[int]] = []
        self._number = itertools.count()
        self._prompt = np.ones(limits.max_context, np.int32)
        most = max((bucket.tiles for bucket in limits.buckets), default=0)
        self._rows_started = max(1, min(most, limits.max_rows))

    def run(self, point: Point) -> tuple[SliceShape, float]:
        """What the slice ran as, and the seconds that the device was busy with it."""
        contexts = point.contexts
        started = [self._start(slot, n - 2, 1, 1) for slot, n in enumerate(contexts)]
        for first in range(0, len(started), self._rows_started):
            self._slice(started[first : first + self._rows_started], 1)
        rows = [self._row(slot, n, point.steps) for slot, n in enumerate(contexts)]
        for slot, (start, size) in enumerate(point.chunks, len(contexts)):
            rows.append(self._start(slot, start, size, point.steps))
        began_s = self._busy() if self._busy else 0.0
        plan, result = self._slice(rows, point.steps)
        seconds = self._busy() - began_s if self._busy else result.slice_s
        self.made = result.tokens
        shape = slice_shape(
            plan,
            lengths=[*contexts, *(start + size for start, size in point.chunks)],
            counts=[len(made) for made in result.tokens],
            steps_run=result.steps_run,
            rows_run=result.rows_run,
            prefill_run=result.prefill_run,
        )
        return shape, seconds

    def _slice(self, rows: Sequence[RowPlan], steps: int) -> tuple[SlicePlan, SliceResult]:
        plan = SlicePlan(next(self._number), steps, len(rows), tuple(rows))
        return plan, self._executor.wait(self._executor.dispatch(plan))

    def _row(self, slot: int, length: int, steps: int) -> RowPlan:
        limits = self.limits
        num_pages = -(-(length + steps) // limits.page_size)
        # Pages of its own for every row, as far as the pool goes: shared ones would stay in caches.
        most = -(-limits.max_context // limits.page_size)
        first = slot * min(most, limits.num_pages // limits.max_rows)
        pages = [page % limits.num_pages for page in range(first, first + num_pages)]
        return RowPlan(slot, steps, num_pages * limits.page_size, pages)

    def _start(self, slot: int, start: int, size: int, steps: int) -> RowPlan:
        row = self._row(slot, start + size, steps)
        row.chunk = Chunk(self._prompt[:size], start)
        row.start = RowStart(
            params=self._params,
            seed=slot,
            max_length=self.limits.max_context,
            prompt=self._prompt[: start + size],
            made=(),
        )
        return row


def make_points(limits: Limits, *, each: int, seed: int) -> list[Point]:
    """`each` random points for every program, program by program in turn."""
    rng = np.random.default_rng(seed)
    return [_point(rng, limits, bucket) for _ in range(each) for bucket in limits.buckets]


def _point(rng: np.random.Generator, limits: Limits, bucket: Bucket) -> Point:
    """One that `bucket` is the smallest program for."""
    num_rows = _between(rng, _size_below(limits, bucket, "rows") + 1, bucket.rows)
    steps = int(rng.choice([n for n in (1, 2, 4, 8, MOST_STEPS) if n <= limits.max_steps]))
    longest = limits.max_context - steps
    num_chunks, tokens = 0, 0
    if bucket.tiles:
        least = _size_below(limits, bucket, "tiles") + 1
        num_chunks = _between(rng, 1, min(4, num_rows, least))
        tokens = limits.tile * _between(rng, least, bucket.tiles) - int(rng.integers(limits.tile))
        tokens = min(tokens, num_chunks * longest)
    scale = math.exp(rng.uniform(math.log(8), math.log(longest)))
    lengths = np.clip(scale * rng.uniform(0.5, 1.5, num_rows), 3, longest).astype(int).tolist()
    sizes = [min(size, longest) for size in _cut(tokens, num_chunks, limits.tile)]
    chunks = [
        (max(0, min(length, longest) - size) if rng.random() < 0.5 else 0, size)
        for length, size in zip(lengths, sizes, strict=False)
    ]
    return Point(steps, tuple(lengths[num_chunks:]), tuple(chunks))


def _size_below(limits: Limits, bucket: Bucket, name: str) -> int:
    """The size of the next smaller program of the same kind, or 0."""
    of_kind = [b for b in limits.buckets if (b.tiles > 0) == (bucket.tiles > 0)]
    sizes = [getattr(b, name) for b in of_kind if getattr(b, name) < getattr(bucket, name)]
    return max(sizes, default=0)


def _between(rng: np.random.Generator, least: int, most: int) -> int:
    return int(rng.integers(least, most + 1))


def _cut(tokens: int, num_chunks: int, tile: int) -> list[int]:
    """Chunks of whole tiles but for the last, so that they need no more tiles than one chunk."""
    if not num_chunks:
        return []
    tiles, sizes = -(-tokens // tile), []
    for left in range(num_chunks, 1, -1):
        sizes.append(tile * max(1, (tiles - sum(sizes) // tile) // left))
    return [*sizes, tokens - sum(sizes)]


def prefill_points(limits: Limits, rows: int, length: int) -> list[Point]:
    """The slices that take in `rows` prompts of `length` tokens, as the token budget cuts them."""
    budget = limits.tile * max(bucket.tiles for bucket in limits.buckets)
    points, chunks, left = [], [], budget
    for _ in range(rows):
        start = 0
        while start < length:
            size = min(left, length - start)
            chunks.append((start, size))
            start, left = start + size, left - limits.tile * -(-size // limits.tile)
            if left < limits.tile:
                points.append(Point(1, (), tuple(chunks)))
                chunks, left = [], budget
    return [*points, Point(1, (), tuple(chunks))] if chunks else points


def measure_points(
    bench: SliceBench,
    points: Sequence[Point],
    *,
    seconds: float,
    clock: Callable[[], float],
    progress: Callable[[str], None],
    seed: int = 0,
) -> list[Measurement]:
    """Measure all points in rounds for about so many seconds, at least `LEAST_ROUNDS` rounds."""
    rng, said_s = np.random.default_rng(seed), -math.inf
    started_s = clock()
    progress(f"round 0 of {len(points)} slices, not counted")
    measurements = [Measurement(point, bench.run(point)[0]) for point in points]
    round_s = max(clock() - started_s, 1e-6)
    rounds = max(LEAST_ROUNDS, int(seconds / round_s) - 1)
    for done in range(1, rounds + 1):
        for i in rng.permutation(len(points)).tolist():
            measurements[i].seconds.append(bench.run(measurements[i].point)[1])
        now_s = clock()
        if now_s - said_s >= _LINE_EVERY_S:
            said_s, left_s = now_s, (now_s - started_s) / (done + 1) * (rounds - done)
            progress(f"round {done}/{rounds} of {len(points)} slices, {left_s:.0f} s to go")
        if done >= LEAST_ROUNDS and now_s - started_s + round_s > seconds:
            break
    return measurements


def spread_of(measurements: Sequence[Measurement]) -> list[float]:
    """Relative distances of repeated identical slices from their medians."""
    return [seconds / each.median_s - 1 for each in measurements for seconds in each.seconds]
