"""Least squares: against numpy, against every sign, and point by point."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.estimators.least_squares import (
    RecursiveLeastSquares,
    fit,
    fit_not_negative,
)


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = rng.uniform(0, 1, (30, 4)) * np.array([1e4, 1e2, 10, 1])
    return columns, columns @ rng.normal(size=4) + rng.normal(size=30)


@given(seed=st.integers(0, 1000))
def test_no_other_coefficients_miss_by_less(seed: int) -> None:
    columns, values = problem(seed)
    rng = np.random.default_rng(seed)
    for method, floor in ((fit, -np.inf), (fit_not_negative, 0.0)):
        found = method(columns, values)
        assert found.min() >= floor
        least = np.linalg.norm(columns @ found - values)
        for _ in range(20):
            other = np.maximum(found + rng.normal(size=4) * [1e-5, 1e-3, 1e-2, 0.1], floor)
            assert np.linalg.norm(columns @ other - values) >= least - 1e-9


def test_without_forgetting_it_ends_where_the_whole_fit_does() -> None:
    columns, values = problem(1)
    online = RecursiveLeastSquares(
        np.zeros(4), scale=np.array([1e-4, 1e-2, 0.1, 1]), forgetting=1.0, uncertainty=1e9
    )
    for row, value in zip(columns, values, strict=True):
        online.observe(row, value)
    assert online.coefficients == pytest.approx(fit(columns, values), rel=1e-3)


def test_forgetting_follows_what_changed() -> None:
    columns, _ = problem(2)
    old, new = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 5.0, 3.0])
    errors = {}
    for forgetting in (0.9, 1.0):
        online = RecursiveLeastSquares(
            np.zeros(4), scale=np.array([1e-4, 1e-2, 0.1, 1]), forgetting=forgetting
        )
        for truth in (old, new):
            for row in np.tile(columns, (3, 1)):
                online.observe(row, row @ truth)
        errors[forgetting] = np.abs(online.coefficients - new).max()
    assert errors[0.9] < 0.05 < errors[1.0]
