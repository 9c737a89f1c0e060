"""SCLS's model of serving time: bilinear in the rows N and the padded length L of a static batch.

    prefill         p1 N L + p2 N + p3 L + p4
    a decode step   d1 N l + d2 N + d3 l + d4      at context length l
(papers.md 1.2; the form comes from a re-implementation of SCLS, arXiv 2406.13511, the sum over a
slice is reconstruction.) Fitted to measured points, or to what another model predicts, and refined
while serving. Feed it the padded N and L that really run, and never a slice that compiled
something.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .fitted_time import FitError, fit_error
from .least_squares import RecursiveLeastSquares, fit, fit_not_negative
from .serving_time import SliceShape
from .slice_time import SliceTime

Point = tuple[int, int, float]
"""Rows, length and measured seconds."""


@dataclass(frozen=True, slots=True)
class Bilinear:
    """Seconds: `rows_length` N L + `rows` N + `length` L + `fixed`."""

    rows_length: float
    rows: float
    length: float
    fixed: float

    def seconds(self, rows: int, length: int) -> float:
        return (self.rows_length * rows + self.length) * length + self.rows * rows + self.fixed


@dataclass(frozen=True, slots=True)
class BilinearTime:
    """Both models together."""

    prefill: Bilinear
    decode: Bilinear

    def decode_s(self, rows: int, length: int, steps: int) -> float:
        """Seconds of `steps` decode steps after `length` tokens of context, in closed form."""
        per_token = self.decode.rows_length * rows + self.decode.length
        contexts = steps * length + steps * (steps + 1) / 2
        return steps * (self.decode.rows * rows + self.decode.fixed) + per_token * contexts

    def slice_s(self, rows: int, length: int, steps: int) -> float:
        """Seconds of a slice that prefills `length` tokens of each row and decodes `steps`."""
        return self.prefill.seconds(rows, length) + self.decode_s(rows, length, steps)

    def grows_with_length(self, *, most_rows: int, steps: int) -> bool:
        """Whether no slice of up to so many rows gets faster as it gets longer.

        What a token more of length costs is linear in the rows, so that both ends decide. SCLS's
        batching is optimal only then.
        """
        return all(
            self.slice_s(rows, 1, steps) >= self.slice_s(rows, 0, steps) for rows in (1, most_rows)
        )


@dataclass(frozen=True, slots=True)
class BilinearFit:
    """A fitted model and how far off it is on points held out; `not_negative` says that the plain
    fit was not usable."""

    time: BilinearTime
    prefill_error: FitError
    decode_error: FitError
    not_negative: bool


def fit_bilinear(
    prefill: Sequence[Point],
    decode: Sequence[Point],
    *,
    held_out_prefill: Sequence[Point],
    held_out_decode: Sequence[Point],
    most_rows: int,
    steps: int,
) -> BilinearFit:
    """Fit both models and judge them on points held out.

    Where a slice of `steps` steps would get faster with length for up to `most_rows` rows, both are
    fitted again without negative coefficients. Raises ValueError for points that are too few or do
    not tell the columns apart.
    """
    time = BilinearTime(_fitted(prefill, fit), _fitted(decode, fit))
    not_negative = not time.grows_with_length(most_rows=most_rows, steps=steps)
    if not_negative:
        time = BilinearTime(_fitted(prefill, fit_not_negative), _fitted(decode, fit_not_negative))
    return BilinearFit(
        time=time,
        prefill_error=_error(time.prefill, held_out_prefill),
        decode_error=_error(time.decode, held_out_decode),
        not_negative=not_negative,
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """Static batches: every number of `rows` with every padded length of `lengths`."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)

    def places(self) -> list[tuple[int, int]]:
        return [(rows, length) for rows in self.rows for length in self.lengths]

    def between(self) -> list[tuple[int, int]]:
        """Places in the middle of four of the grid's, to judge a fit by."""
        rows = [(a + b) // 2 for a, b in zip(self.rows, self.rows[1:], strict=False)]
        lengths = [(a + b) // 2 for a, b in zip(self.lengths, self.lengths[1:], strict=False)]
        return Grid(tuple(sorted(set(rows))), tuple(sorted(set(lengths)))).places()


def bilinear_of(slice_time: SliceTime, grid: Grid, *, steps: int = 128) -> BilinearFit:
    """SCLS's model fitted to what another one predicts for static batches.

    A prefill of N rows padded to L is one step of N L prompt tokens, a decode step at context l
    what a second step of N such rows adds to a slice. Judged between the places of `grid`.
    """

    def prefill_s(rows: int, length: int) -> float:
        attended = rows * length * (length + 1) // 2
        return slice_time.slice_s(SliceShape(1, rows, 0, rows * length, attended))

    def decode_s(rows: int, length: int) -> float:
        one, two = (slice_time.slice_s(SliceShape(n, rows, n * rows * length, 0)) for n in (1, 2))
        return two - one

    def points(seconds: Callable[[int, int], float], places: list[tuple[int, int]]) -> list[Point]:
        return [(rows, length, seconds(rows, length)) for rows, length in places]

    return fit_bilinear(
        points(prefill_s, grid.places()),
        points(decode_s, grid.places()),
        held_out_prefill=points(prefill_s, grid.between()),
        held_out_decode=points(decode_s, grid.between()),
        most_rows=max(grid.rows),
        steps=steps,
    )


def _fitted(
    points: Sequence[Point], how: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Bilinear:
    rows, length, seconds = np.array(points, float).reshape(-1, 3).T
    columns = np.stack([rows * length, rows, length, np.ones_like(rows)], axis=1)
    return Bilinear(*how(columns, seconds).tolist())


def _error(model: Bilinear, points: Sequence[Point]) -> FitError:
    return fit_error([model.seconds(rows, length) / s - 1 for rows, length, s in points])


class RefinedTime:
    """A model that learns from the slices it predicted, older ones counting less and less.

    Errors count relative to the slice. A coefficient that is 0 stays there. Predictions are those
    of the newest coefficients that still grow with length.
    """

    def __init__(
        self, time: BilinearTime, *, most_rows: int, steps: int, forgetting: float = 0.995
    ):
        if not time.grows_with_length(most_rows=most_rows, steps=steps):
            raise ValueError(
                f"time: got {time}, which falls as slices get longer; allowed: one that grows for"
                f" up to {most_rows} rows and {steps} steps"
            )
        self.time = time
        self._most_rows, self._steps = most_rows, steps
        first = np.array([*dataclasses.astuple(time.prefill), *dataclasses.astuple(time.decode)])
        scale = np.where(first == 0, 1e-300, np.abs(first))
        self._fit = RecursiveLeastSquares(first, scale=scale, forgetting=forgetting)

    def observe(self, rows: int, length: int, steps: int, seconds: float) -> None:
        """Learn from one measured slice that prefilled `length` tokens of each row."""
        contexts = steps * length + steps * (steps + 1) / 2
        prefill = (rows * length, rows, length, 1)
        decode = (rows * contexts, rows * steps, contexts, steps)
        self._fit.observe(np.array([*prefill, *decode]) / seconds, 1.0)
        values = self._fit.coefficients.tolist()
        time = BilinearTime(Bilinear(*values[:4]), Bilinear(*values[4:]))
        if time.grows_with_length(most_rows=self._most_rows, steps=self._steps):
            self.time = time
