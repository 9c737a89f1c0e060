"""Recursive least squares of five coefficients, written out.

`least_squares.RecursiveLeastSquares` for one size that is learnt from at every slice: of vectors
this short its dozen calls of numpy take 8 us, or 14 beside a scheduler's other work; this takes 2.
Knows no seconds and no slices.
"""

import math
from operator import mul
from typing import Final

_Number = float | int
Terms = tuple[_Number, _Number, _Number, _Number, _Number]
_Covariance = tuple[float, ...]
"""It is symmetric: the 15 numbers of its lower triangle, line by line."""


_PLACES: Final = tuple((line, column) for line in range(5) for column in range(line + 1))
_SLACK: Final = 1.5
"""How far above their bound variances may be before they are taken back: now and then, not at every
point."""


class FiveTerms:
    """Coefficients kept up to date, point by point; older points count less and less.

    `scale` multiplies the columns so that the normal matrix stays well conditioned; `uncertainty`
    is the variance of the scaled first coefficients where a point's is 1, and the most that a
    coefficient's ever becomes: forgetting would let it grow for one that no point tells about.
    """

    def __init__(self, first: Terms, *, scale: Terms, forgetting: float, uncertainty: float = 1e2):
        u = uncertainty
        self.coefficients: Terms = first
        self._scale, self._forgetting = scale, forgetting
        self._weights = tuple(value / size for value, size in zip(first, scale, strict=True))
        self._covariance: _Covariance = tuple(
            u if line == column else 0.0 for line, column in _PLACES
        )
        self._uncertainty = u

    def observe(self, row: Terms, value: _Number) -> None:
        """Learn from one point."""
        c00, c10, c11, c20, c21, c22, c30, c31, c32, c33, c40, c41, c42, c43, c44 = self._covariance
        x0, x1, x2, x3, x4 = map(mul, row, self._scale)
        s0 = c00 * x0 + c10 * x1 + c20 * x2 + c30 * x3 + c40 * x4
        s1 = c10 * x0 + c11 * x1 + c21 * x2 + c31 * x3 + c41 * x4
        s2 = c20 * x0 + c21 * x1 + c22 * x2 + c32 * x3 + c42 * x4
        s3 = c30 * x0 + c31 * x1 + c32 * x2 + c33 * x3 + c43 * x4
        s4 = c40 * x0 + c41 * x1 + c42 * x2 + c43 * x3 + c44 * x4
        total = self._forgetting + x0 * s0 + x1 * s1 + x2 * s2 + x3 * s3 + x4 * s4
        g0, g1, g2, g3, g4 = s0 / total, s1 / total, s2 / total, s3 / total, s4 / total
        w0, w1, w2, w3, w4 = self._weights
        error = value - (w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + w4 * x4)
        self._weights = (
            w0 + g0 * error,
            w1 + g1 * error,
            w2 + g2 * error,
            w3 + g3 * error,
            w4 + g4 * error,
        )
        self.coefficients = tuple(map(mul, self._weights, self._scale))
        grow = 1 / self._forgetting
        c00, c10, c11 = (c00 - g0 * s0) * grow, (c10 - g1 * s0) * grow, (c11 - g1 * s1) * grow
        c20, c21, c22 = (c20 - g2 * s0) * grow, (c21 - g2 * s1) * grow, (c22 - g2 * s2) * grow
        c30, c31, c32 = (c30 - g3 * s0) * grow, (c31 - g3 * s1) * grow, (c32 - g3 * s2) * grow
        c33, c40, c41 = (c33 - g3 * s3) * grow, (c40 - g4 * s0) * grow, (c41 - g4 * s1) * grow
        c42, c43, c44 = (c42 - g4 * s2) * grow, (c43 - g4 * s3) * grow, (c44 - g4 * s4) * grow
        # fmt: off
        self._covariance = (
            c00, c10, c11, c20, c21, c22, c30, c31, c32, c33, c40, c41, c42, c43, c44,
        )
        # fmt: on
        if max(c00, c11, c22, c33, c44) > _SLACK * self._uncertainty:
            self._bound_variances()

    def _bound_variances(self) -> None:
        """Take the largest variances back to the bound, correlations as they are."""
        values, most = self._covariance, self._uncertainty
        variances = [
            values[place] for place, (line, column) in enumerate(_PLACES) if line == column
        ]
        shrink = [math.sqrt(most / each) if each > most else 1.0 for each in variances]
        self._covariance = tuple(
            value * shrink[line] * shrink[column]
            for value, (line, column) in zip(values, _PLACES, strict=True)
        )
