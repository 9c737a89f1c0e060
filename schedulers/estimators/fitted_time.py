"""Slice times fitted to measured slices, from physical terms that all cost something or nothing.

    slice   dispatch + decode steps * step(rows) + attended tokens * attended [+ mixed step 0]
    step 0  with prompts: prompt step + rows * prompt row + prompt tokens * prompt token
            + tokens attended by prompts * prompt attended
Rows and prompt tokens are those of the bucket, padding included; a slice with prompts has one
decode step less. `step` is a curve through the row buckets that never falls, for no straight line
fits them: a matrix product of 8 rows is another kernel than one of 1 (on one CPU core 2.3 ms for 1
row, 5.9 ms for 8, 7.3 ms for 16). All coefficients are 0 or more, so that predictions grow with
every size, beyond the measured range too.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from .least_squares import fit_not_negative
from .serving_time import SliceShape
from .slice_time import HostTime, SliceTime

Measured = tuple[SliceShape, float]
"""What ran, and its seconds."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a size, straight between the `sizes` given, and on along the ends beyond."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, size: int) -> float:
        sizes, seconds = self.sizes, self.seconds
        if len(sizes) == 1:
            return seconds[0]
        i = min(max(bisect.bisect_left(sizes, size), 1), len(sizes) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i] + slope * (size - sizes[i])


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTime:
    """Seconds of each term; `host` holds those of the host's work around a slice."""

    dispatch_s: float
    step_s: Curve
    attended_s: float
    prompt_step_s: float = 0.0
    prompt_row_s: float = 0.0
    prompt_token_s: float = 0.0
    prompt_attended_s: float = 0.0
    host: HostTime = HostTime()

    def slice_s(self, shape: SliceShape) -> float:
        steps, seconds = shape.steps, self.dispatch_s
        if shape.prefill_tokens:
            steps -= 1
            seconds += self.prompt_step_s + self.prompt_row_s * shape.rows
            seconds += self.prompt_token_s * shape.prefill_tokens
            seconds += self.prompt_attended_s * shape.prefill_attended_tokens
        return seconds + steps * self.step_s(shape.rows) + self.attended_s * shape.attended_tokens

    def host_s(self, shape: SliceShape) -> float:
        return self.host.seconds(shape)

    def scaled(self, factor: float) -> "FittedTime":
        """The same on a device that takes `factor` times as long; the host's part as it is."""
        terms = {
            field.name: factor * getattr(self, field.name)
            for field in fields(self)
            if field.type is float
        }
        curve = Curve(self.step_s.sizes, tuple(factor * s for s in self.step_s.seconds))
        return replace(self, step_s=curve, **terms)


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative errors on points, mean and largest."""

    mean: float
    largest: float
    num_points: int


def error_on(time: SliceTime, points: Sequence[Measured]) -> FitError:
    """How far predictions are from the measured seconds. Raises ValueError without points."""
    return fit_error([time.slice_s(shape) / seconds - 1 for shape, seconds in points])


def fit_error(relative: Sequence[float]) -> FitError:
    """Of relative errors, signed or not. Raises ValueError without any."""
    if not len(relative):
        raise ValueError("points to judge a fit by: got none; allowed: at least one")
    sizes = [abs(error) for error in relative]
    return FitError(sum(sizes) / len(sizes), max(sizes), len(sizes))


def fit_time(points: Sequence[Measured], *, host: HostTime | None = None) -> FittedTime:
    """The model with the least relative error, squared and summed over `points`.

    Terms that no point has stay 0; where all prompt steps are of one size, its whole cost counts
    as its prompt tokens'. Raises ValueError when no point decodes, or when points do not tell the
    terms apart.
    """
    sizes = sorted({shape.rows for shape, _ in points if _decode_steps(shape)})
    if not sizes:
        raise ValueError("points: got none with a decode step; allowed: at least one")
    columns = np.array([_columns(shape, sizes) for shape, _ in points])
    seconds = np.array([seconds for _, seconds in points])
    there = np.array(columns.any(axis=0))
    mixed = columns[:, _PROMPT_STEP] > 0
    if mixed.any():
        there[_PROMPT_STEP] = len(set(columns[mixed, _PROMPT_TOKEN])) > 1
        there[_PROMPT_ROW] = len(set(columns[mixed, _PROMPT_ROW])) > 1
    values = np.zeros(columns.shape[1])
    relative = columns[:, there] / seconds[:, None]
    values[there] = fit_not_negative(relative, np.ones(len(points)))
    dispatch, attended, *rest = values.tolist()
    prompt, step = rest[:4], rest[4:]
    return FittedTime(
        dispatch_s=dispatch,
        step_s=Curve(tuple(sizes), tuple(np.cumsum(step).tolist())),
        attended_s=attended,
        prompt_step_s=prompt[0],
        prompt_row_s=prompt[1],
        prompt_token_s=prompt[2],
        prompt_attended_s=prompt[3],
        host=host or HostTime(),
    )


def fit_host(points: Sequence[Measured]) -> HostTime:
    """The host's work around slices; of points whose sizes do not tell the terms apart, its mean.

    Unlike a slice's, these seconds scatter far and towards the long side: absolute errors count,
    so that the sum over many slices is right.
    """
    columns = np.array(
        [(1, s.rows, s.rows * s.steps, s.prefill_tokens) for s, _ in points], float
    ).reshape(-1, 4)
    seconds = np.array([seconds for _, seconds in points])
    try:
        return HostTime(*fit_not_negative(columns, seconds).tolist())
    except ValueError:
        return HostTime(max(0.0, float(seconds.mean()))) if len(points) else HostTime()


def _decode_steps(shape: SliceShape) -> int:
    return shape.steps - (shape.prefill_tokens > 0)


_PROMPT_STEP, _PROMPT_ROW, _PROMPT_TOKEN = 2, 3, 4


def _columns(shape: SliceShape, sizes: Sequence[int]) -> np.ndarray:
    """The terms of a slice, the curve's last: its first value and the rise to each next size."""
    steps, mixed = _decode_steps(shape), float(shape.prefill_tokens > 0)
    prompt = [mixed, mixed * shape.rows, shape.prefill_tokens, shape.prefill_attended_tokens]
    rises = [min((shape.rows - a) / (b - a), 1.0) for a, b in zip(sizes, sizes[1:], strict=False)]
    step = [float(steps), *(steps * max(0.0, rise) for rise in rises)]
    return np.array([1.0, shape.attended_tokens, *prompt, *step])
