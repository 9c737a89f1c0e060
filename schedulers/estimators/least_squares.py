"""Least squares for models that are linear in their coefficients: in one go, without negative
coefficients, and online. Knows no seconds and no slices.
"""

from typing import Final

import numpy as np


def fit(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients [C] of `columns` [P, C] that miss `values` [P] least.

    Columns are scaled to one size first: N * L beside 1 would make them nearly singular. Raises
    ValueError where the points do not tell the columns apart.
    """
    scale = np.abs(columns).max(axis=0, initial=0.0)
    if not scale.all():
        raise ValueError("a column of the points is zero throughout")
    solution, _, rank, _ = np.linalg.lstsq(columns / scale, values, rcond=None)
    if rank < columns.shape[1]:
        raise ValueError(f"{len(values)} points tell {rank} of {columns.shape[1]} columns apart")
    return solution / scale


def fit_not_negative(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The same among coefficients that are 0 or more.

    Source: Lawson and Hanson 1974, chapter 23: columns enter one by one, the one that helps most
    first, and leave when the fit would make them negative.
    """
    count = columns.shape[1]
    fit(columns, values)  # refuses what tells columns apart too little
    scale = np.abs(columns).max(axis=0)
    scaled = columns / scale
    tolerance = 1e-10 * float(np.abs(scaled.T @ values).max(initial=0.0))
    weights, used = np.zeros(count), np.zeros(count, bool)
    for _ in range(10 * count):
        gradient = scaled.T @ (values - scaled @ weights)
        gradient[used] = -np.inf
        best = int(np.argmax(gradient))
        if used.all() or gradient[best] <= tolerance:
            break
        used[best] = True
        weights = _step_inside(scaled, values, weights, used)
    return weights / scale


def _step_inside(
    columns: np.ndarray, values: np.ndarray, weights: np.ndarray, used: np.ndarray
) -> np.ndarray:
    """Move towards the fit of the `used` columns; those that reach zero first are dropped there."""
    while used.any():
        wanted = np.zeros_like(weights)
        wanted[used] = np.linalg.lstsq(columns[:, used], values, rcond=None)[0]
        falling = used & (wanted <= 0)
        if not falling.any():
            return wanted
        share = (weights[falling] / (weights[falling] - wanted[falling])).min()
        weights = weights + share * (wanted - weights)
        used &= weights > 1e-12 * weights.max()
        weights[~used] = 0.0
    return weights


_SLACK: Final = 1.5


class RecursiveLeastSquares:
    """Coefficients kept up to date, point by point; older points count less and less.

    `scale` [C] multiplies the columns so that the normal matrix stays well conditioned;
    `uncertainty` is the variance of the scaled first coefficients where a point's is 1, and the
    most that a coefficient's ever becomes: forgetting would let it grow for one that no point tells
    about.
    """

    def __init__(
        self,
        first: np.ndarray,
        *,
        scale: np.ndarray,
        forgetting: float,
        uncertainty: float = 1e2,
    ):
        self._scale = scale
        self._forgetting = forgetting
        self._weights = first / scale
        self._covariance = np.eye(len(first)) * uncertainty
        self._uncertainty = uncertainty

    @property
    def coefficients(self) -> np.ndarray:
        return self._weights * self._scale

    def observe(self, row: np.ndarray, value: float) -> None:
        """Learn from one point."""
        x = row * self._scale
        spread = self._covariance @ x  # and x @ covariance, which is symmetric
        total = self._forgetting + x @ spread
        self._weights += spread * ((value - self._weights @ x) / total)
        self._covariance -= spread[:, None] * spread / total  # symmetric to the last bit
        self._covariance /= self._forgetting
        variances = self._covariance.diagonal()
        if variances.max() > _SLACK * self._uncertainty:  # now and then, not at every point
            shrink = np.sqrt(self._uncertainty / variances.clip(min=self._uncertainty))
            self._covariance *= shrink[:, None] * shrink
