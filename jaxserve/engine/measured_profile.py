"""From slices measured on this device to a profile: fits, and how far off they are.

The model is fitted to two points in three of every program and judged on single slices of the
others. How it does out of range is told by a second fit, to the points of fewer rows and contexts
up to half the model's, judged on the longer and larger ones.
"""

import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxserve import __version__
from jaxserve.config import EngineConfig
from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.engine.build import bench_limits
from jaxserve.engine.executor import Executor
from jaxserve.engine.measure import (
    Limits,
    Measurement,
    Point,
    SliceBench,
    make_points,
    measure_points,
    prefill_points,
    spread_of,
)
from jaxserve.engine.measure_host import LiveSlice, measure_core
from jaxserve.engine.scripted import Pace
from jaxserve.errors import ConfigError
from jaxserve.models.info import ModelInfo
from jaxserve.models.profile import MEASURED, Errors, ModelShape, Profile
from jaxserve.schedulers.estimators.bilinear import BilinearFit, fit_bilinear
from jaxserve.schedulers.estimators.bilinear import Point as BatchPoint
from jaxserve.schedulers.estimators.fitted_time import (
    FitError,
    FittedTime,
    error_on,
    fit_error,
    fit_host,
    fit_time,
)

POINTS_EACH = 9
"""Points of every program."""

_DECODE_STEPS = 8
_GRID_ROWS = (1, 2, 4, 8)
_GRID_LENGTHS = (32, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class MeasuredProfile:
    """A profile, and how it came about: slices measured and seconds it took."""

    profile: Profile
    num_points: int
    num_slices: int
    seconds: float


def measure_profile(
    config: EngineConfig,
    executor: Executor,
    info: ModelInfo,
    *,
    buckets: tuple[Bucket, ...],
    seconds: float,
    progress: Callable[[str], None],
    points_each: int = POINTS_EACH,
) -> MeasuredProfile:
    """Measure for about so many seconds on an executor of `buckets` that nobody else uses.

    Raises ConfigError when too few programs or lengths are there to fit a model.
    """
    began_s = time.monotonic()
    limits = _limits(config, buckets, info)
    # On one core the device is busy while this process runs; what others take is not its time.
    one_core = info.platform == "cpu" and len(os.sched_getaffinity(0)) == 1
    bench = SliceBench(executor, limits, busy=time.process_time if one_core else None)
    points = make_points(limits, each=points_each, seed=1)
    grid = _grid(limits)
    batches = list(itertools.chain(*grid.values()))
    measurements = measure_points(
        bench, [*points, *batches], seconds=seconds, clock=time.monotonic, progress=progress
    )
    try:
        time_, errors = _fits(limits, measurements[: len(points)])
        bilinear = _bilinear(limits, grid, measurements[len(points) :], time_)
    except ValueError as error:
        raise ConfigError(
            f"profile: what was measured fits no model ({error}); allowed: more rows"
            " (--max_rows), prompt tokens (--max_prefill_tokens) or a longer context"
        ) from error
    progress("host: the core's work around slices")
    pace = Pace(time_, Buckets(limits.buckets, tile=limits.tile))
    model = info.config
    host = fit_host(measure_core(config, model, num_pages=limits.num_pages, pace=pace))
    profile = Profile(
        kind=MEASURED,
        model_name=info.name,
        model=ModelShape.of(model),
        device=info.device_kind,
        num_devices=info.num_devices,
        precision=info.dtype,
        page_size=info.page_size,
        num_pages=info.num_pages,
        kernels=dict(info.kernels),
        versions=_versions(),
        date=datetime.date.today().isoformat(),
        host_overlaps=info.platform != "cpu" or len(os.sched_getaffinity(0)) > info.num_devices,
        time=replace(time_, host=host),
        bilinear=bilinear.time,
        errors=replace(errors, prefill=bilinear.prefill_error, decode=bilinear.decode_error),
        notes=("seconds are CPU time of the one core that it was measured on",) * one_core,
    )
    num_slices = sum(len(each.seconds) for each in measurements)
    return MeasuredProfile(profile, len(measurements), num_slices, time.monotonic() - began_s)


def _limits(config: EngineConfig, buckets: tuple[Bucket, ...], info: ModelInfo) -> Limits:
    limits = bench_limits(config, max_context=info.config.max_context, num_pages=info.num_pages)
    return replace(limits, buckets=buckets)


def _fits(limits: Limits, measurements: Sequence[Measurement]) -> tuple[FittedTime, Errors]:
    """The model, and its errors; those of the bilinear model are still to come."""
    per_turn = len(limits.buckets)
    fitted = [each for i, each in enumerate(measurements) if i // per_turn % 3 != 2]
    held_out = [each for i, each in enumerate(measurements) if i // per_turn % 3 == 2]
    time_ = fit_time([each.measured for each in fitted])
    singles = [(each.shape, seconds) for each in held_out for seconds in each.seconds]
    nothing = FitError(0.0, 0.0, 0)
    return time_, Errors(
        spread=fit_error(spread_of(measurements)),
        held_out=error_on(time_, singles),
        out_of_range=_out_of_range(limits, measurements),
        prefill=nothing,
        decode=nothing,
    )


def _out_of_range(limits: Limits, measurements: Sequence[Measurement]) -> FitError | None:
    """Of a fit to small slices on the others; None where it cannot be fitted."""

    def small(each: Measurement) -> bool:
        few = each.shape.rows < limits.max_rows
        return few and each.point.longest <= limits.max_context // 2

    try:
        time_ = fit_time([each.measured for each in measurements if small(each)])
    except ValueError:
        return None
    return error_on(time_, [each.measured for each in measurements if not small(each)])


def _grid(limits: Limits) -> dict[tuple[int, int], list[Point]]:
    """Static batches by rows and padded length: the slices of their prefill, and one to decode."""
    most = limits.max_context - _DECODE_STEPS
    rows = [n for n in _GRID_ROWS if n <= limits.max_rows]
    lengths = [n for n in _GRID_LENGTHS if n <= most]
    steps = min(_DECODE_STEPS, limits.max_steps)
    return {
        (n, length): [*prefill_points(limits, n, length), Point(steps, (length,) * n)]
        for n in rows
        for length in lengths
    }


def _bilinear(
    limits: Limits,
    grid: dict[tuple[int, int], list[Point]],
    measurements: Sequence[Measurement],
    time_: FittedTime,
) -> BilinearFit:
    """SCLS's model, of the batches on the grid; every third is held out."""
    left = iter(measurements)
    prefill: list[BatchPoint] = []
    decode: list[BatchPoint] = []
    for (rows, length), points in grid.items():
        *prompts, one = list(itertools.islice(left, len(points)))
        prefill.append((rows, length, sum(each.median_s for each in prompts)))
        steps = one.shape.steps
        step_s = (one.median_s - time_.dispatch_s) / steps
        decode.append((rows, length + steps // 2, step_s))
    return fit_bilinear(
        [each for i, each in enumerate(prefill) if i % 3 != 2],
        [each for i, each in enumerate(decode) if i % 3 != 2],
        held_out_prefill=prefill[2::3],
        held_out_decode=decode[2::3],
        most_rows=limits.max_rows,
        steps=128,
    )


def live_error(profile: Profile, slices: Sequence[LiveSlice]) -> FitError:
    """Of predicted beside logged device seconds, of slices from a live log."""
    return error_on(profile.time, [(each.shape, each.slice_s) for each in slices])


def with_live_host(profile: Profile, slices: Sequence[LiveSlice]) -> Profile:
    """The profile with the host's work as a live server had it.

    Where host and device share a core it is all that a slice took from the end of the one before,
    beyond what the device is predicted to be busy: the front end's share of the core too. Slices
    that took ten times the median are left out: the server waited for something.
    """
    time_ = profile.time
    typical_s = statistics.median(each.gap_s for each in slices)
    points = [
        (
            each.handled,
            each.host_s if profile.host_overlaps else each.gap_s - time_.slice_s(each.shape),
        )
        for each in slices
        if each.gap_s < 10 * typical_s
    ]
    return replace(profile, time=replace(time_, host=fit_host(points)))


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"jaxserve": __version__, "python": platform.python_version(), **versions}
