"""A static batch as SCLS runs it: padded to its longest member, in step until it returns.

All tokens of every row are computed (recompute form), then each step makes a token for every row,
for as many steps as were asked for or until every member has finished: an early return. Until then
finished members make invalid tokens. Definitions: papers.md 0.2 and 1.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import SliceTime
from jaxserve.sim.pool_executors import BatchRun, Row


@runtime_checkable
class PaddedTime(Protocol):
    """Seconds of a padded batch; `BilinearTime` is one."""

    def slice_s(self, rows: int, length: int, steps: int) -> float:
        """Prefill `length` tokens of each row, then decode `steps` steps."""
        ...


@dataclass(frozen=True, slots=True)
class PaddedSlice:
    """A `PaddedTime`: what a static batch takes on the device that `time` is a model of.

    The first tokens come from the prompts, without a decode step. The host's work is part of it:
    the next batch waits for this one's end.
    """

    time: SliceTime

    def slice_s(self, rows: int, length: int, steps: int) -> float:
        later = steps - 1
        shape = SliceShape(
            steps=steps,
            rows=rows,
            attended_tokens=rows * (later * length + later * (later + 1) // 2),
            prefill_tokens=rows * length,
            prefill_attended_tokens=rows * (length * (length + 1) // 2),
        )
        return self.time.slice_s(shape) + self.time.host_s(shape)


def padded_static(rows: Sequence[Row], steps: int, time: PaddedTime) -> BatchRun:
    """Run `rows` for `steps` steps at most. Nobody left to run: it takes no time."""
    made = tuple(min(steps, row.left) for row in rows)
    steps_run = max(made)
    if not steps_run:
        return BatchRun(0, 0.0, made, 0)
    longest = max(row.length for row in rows)
    prefill_tokens = sum(row.length for row in rows)
    return BatchRun(
        steps=steps_run,
        seconds=time.slice_s(len(rows), longest, steps_run),
        made=made,
        prefill_tokens=prefill_tokens,
        pad_tokens=len(rows) * longest - prefill_tokens,
        invalid_tokens=len(rows) * steps_run - sum(made),
    )
