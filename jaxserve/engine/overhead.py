"""What slices cost beyond steps and prompt tokens: from a few of them, before anything is served.

One row decodes for one step and for several, and takes in two prompts: straight lines through the
two of each kind, at nothing, are what a dispatch and a step with prompts cost.
"""

import time
from typing import Final

from jaxserve.engine.executor import Executor
from jaxserve.engine.measure import Limits, Point, SliceBench, measure_points
from jaxserve.engine.scripted import Pace, ScriptedExecutor
from jaxserve.schedulers.estimators.fitted_time import Measured
from jaxserve.schedulers.estimators.serving_time import UNMEASURED, SliceOverhead

_SECONDS: Final = 0.5
_STEPS: Final = 8
_CONTEXT: Final = 8
_LEAST_S: Final = 1e-5


def measure_overhead(
    executor: Executor, limits: Limits, *, seconds: float = _SECONDS
) -> SliceOverhead:
    """Measure for about so long, and a few rounds at least, on an executor of `limits` that nobody
    else uses.

    `UNMEASURED` where slices of two lengths cannot be had: one step at a time is not planned by it.
    """
    steps = min(_STEPS, limits.max_steps, limits.max_context - _CONTEXT)
    if steps < 2:
        return UNMEASURED
    prompts = _prompts(limits)
    points = [Point(1, (_CONTEXT,)), Point(steps, (_CONTEXT,)), *prompts]
    bench = SliceBench(executor, limits)
    made = measure_points(
        bench, points, seconds=seconds, clock=time.monotonic, progress=lambda _: None
    )
    one, several, *mixed = (each.measured for each in made)
    dispatch_s = max(_LEAST_S, one[1] - (several[1] - one[1]) / (steps - 1))
    return SliceOverhead(dispatch_s, max(0.0, _at_no_token(mixed) - dispatch_s))


def predicted_overhead(pace: Pace, limits: Limits, *, vocab_size: int) -> SliceOverhead:
    """What would be measured on a device that takes as long as the model of time says."""
    device = ScriptedExecutor(
        vocab_size=vocab_size, pace=pace, now=lambda: 0.0, sleep=lambda _: None
    )
    return measure_overhead(device, limits, seconds=0.0)


def _prompts(limits: Limits) -> list[Point]:
    """One prompt that fills the smallest program for prompts, and one that fills the largest that
    a context fills."""
    rows = min(bucket.rows for bucket in limits.buckets)
    tiles = sorted(bucket.tiles for bucket in limits.buckets if bucket.rows == rows)
    sizes = [limits.tile * each for each in tiles if each]
    fitting = [size for size in sizes if size < limits.max_context] or [limits.max_context - 1]
    return [Point(1, (), ((0, size),)) for size in dict.fromkeys((fitting[0], fitting[-1]))]


def _at_no_token(mixed: list[Measured]) -> float:
    """Where one program alone has prompts, nothing of it counts as its tokens'."""
    (shape, least_s), (largest, most_s) = mixed[0], mixed[-1]
    if largest.prefill_tokens == shape.prefill_tokens:
        return least_s
    token_s = (most_s - least_s) / (largest.prefill_tokens - shape.prefill_tokens)
    return least_s - token_s * shape.prefill_tokens
