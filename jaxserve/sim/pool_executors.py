"""What a batch that a pool planner made costs on a modelled device, and what each row makes of it.

Two devices: `padded_static`, in a file of its own, and `continuous_slice`, which stands for our
engine with the `modelled` executor. Knows no planner and no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.engine.buckets import Buckets
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import SliceTime


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a batch: its tokens so far, how many more it will make until its end (0: its client
    has hung up), and whether its tokens are computed again first."""

    length: int
    left: int
    prefills: bool


@dataclass(frozen=True, slots=True)
class BatchRun:
    """`made` by row. `pad_tokens`: sum of (longest - length); `invalid_tokens`: made by rows that
    had finished, because the batch was still running."""

    steps: int
    seconds: float
    made: tuple[int, ...]
    prefill_tokens: int
    pad_tokens: int = 0
    invalid_tokens: int = 0


def continuous_slice(
    rows: Sequence[Row], steps: int, time: SliceTime, buckets: Buckets | None = None
) -> BatchRun:
    """A slice of a continuous engine: rows are not padded to each other, and masked when they end.

    It takes the host's work too: the next plan waits for its end. Nobody left to run: no time.
    With `buckets`, programs are padded as those of the engine, one after the other for prompts that
    exceed the largest.
    """
    made = tuple(min(steps, row.left) for row in rows)
    steps_run = max(made)
    if not steps_run:
        return BatchRun(0, 0.0, made, 0)
    prefills = [row.length for row in rows if row.prefills and row.left]
    attended = sum(
        (tokens - row.prefills) * row.length + tokens * (tokens - 1) // 2
        for row, tokens in zip(rows, made, strict=True)
        if tokens
    )
    rows_run, prefill_run = _program(len(rows), prefills, buckets)
    shape = SliceShape(
        steps=steps_run,
        rows=rows_run,
        attended_tokens=attended,
        prefill_tokens=prefill_run,
        prefill_attended_tokens=sum(length * (length + 1) // 2 for length in prefills),
    )
    return BatchRun(steps_run, time.slice_s(shape) + time.host_s(shape), made, sum(prefills))


def _program(rows: int, prefills: Sequence[int], buckets: Buckets | None) -> tuple[int, int]:
    """Rows and prompt tokens that really run."""
    if buckets is None:
        return rows, sum(prefills)
    tiles = sum(-(-length // buckets.tile) for length in prefills)
    full, rest = divmod(tiles, buckets.most_tiles)
    last = buckets.smallest(rows, [rest * buckets.tile] if rest else [])
    return last.rows, (full * buckets.most_tiles + last.tiles) * buckets.tile
