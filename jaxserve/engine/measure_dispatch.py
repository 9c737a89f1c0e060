"""What a slice takes beyond its steps: from two kinds of slices, before anything is served.

One row decodes for one step and for several; a straight line through both, at no step, is what a
dispatch takes.
"""

import time
from typing import Final

from jaxserve.engine.executor import Executor
from jaxserve.engine.measure import Limits, Point, SliceBench, measure_points
from jaxserve.engine.scripted import Pace, ScriptedExecutor
from jaxserve.schedulers.estimators.serving_time import UNMEASURED_S

_SECONDS: Final = 1.0
_STEPS: Final = 8
_CONTEXT: Final = 8
_LEAST_S: Final = 1e-5


def measure_dispatch(executor: Executor, limits: Limits, *, seconds: float = _SECONDS) -> float:
    """Measure for about so long, and a few rounds at least, on an executor of `limits` that nobody
    else uses.

    `UNMEASURED_S` where slices of two lengths cannot be had: one step at a time is not planned by
    it.
    """
    steps = min(_STEPS, limits.max_steps, limits.max_context - _CONTEXT)
    if steps < 2:
        return UNMEASURED_S
    points = [Point(1, (_CONTEXT,)), Point(steps, (_CONTEXT,))]
    one, several = measure_points(
        SliceBench(executor, limits),
        points,
        seconds=seconds,
        clock=time.monotonic,
        progress=lambda _: None,
    )
    # Where noise makes the longer slice the shorter one, a dispatch is no more than a slice.
    step_s = max(0.0, several.median_s - one.median_s) / (steps - 1)
    return max(_LEAST_S, one.median_s - step_s)


def predicted_dispatch(pace: Pace, limits: Limits, *, vocab_size: int) -> float:
    """What would be measured on a device that takes as long as the model of time says."""
    device = ScriptedExecutor(
        vocab_size=vocab_size, pace=pace, now=lambda: 0.0, sleep=lambda _: None
    )
    return measure_dispatch(device, limits, seconds=0.0)
