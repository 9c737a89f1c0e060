"""What a slice ran, in the sizes that models of its time are told. Knows no device and no JAX."""

from collections.abc import Sequence

from jaxserve.engine.plan import SlicePlan
from jaxserve.schedulers.estimators.serving_time import SliceShape


def slice_shape(
    plan: SlicePlan,
    *,
    lengths: Sequence[int],
    counts: Sequence[int],
    steps_run: int,
    rows_run: int,
    prefill_run: int,
) -> SliceShape:
    """The shape of a slice in which row b of the plan made `counts[b]` tokens.

    `lengths[b]` is the row's tokens when the slice began, or where its chunk ends. A decoding row
    attends to all of them, its newest included, and to one more at each step; a row whose prompt
    ends gets its first token from the prompt. `rows_run` and `prefill_run` are the bucket's.
    """
    attended = prefill_attended = 0
    for row, length, count in zip(plan.rows, lengths, counts, strict=True):
        decode_steps = count
        if row.chunk is not None:
            size, start = row.chunk.tokens.size, row.chunk.start
            prefill_attended += size * start + size * (size + 1) // 2
            decode_steps = max(0, count - 1)
        attended += decode_steps * length + count * (count - 1) // 2
    return SliceShape(steps_run, rows_run, attended, prefill_run, prefill_attended)
