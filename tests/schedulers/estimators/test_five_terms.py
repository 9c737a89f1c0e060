"""Five terms, written out: the same as the vectors, and not thrown off by slices that are alike."""

import random

import numpy as np
import pytest

from jaxserve.schedulers.estimators.five_terms import FiveTerms, Terms
from jaxserve.schedulers.estimators.least_squares import RecursiveLeastSquares

FIRST = (2e-3, 1e-3, 1e-4, 1e-7, 1e-4)
SCALE = (1e-1, 1e-2, 1e-3, 1e-5, 1e-3)


def rows(count: int) -> list[Terms]:
    rng = random.Random(0)
    return [
        (
            rng.randint(1, 64),
            rng.randint(1, 300),
            rng.randint(1, 2000),
            rng.randint(0, 90_000),
            rng.choice((0, 32, 64)),
        )
        for _ in range(count)
    ]


def test_it_learns_what_the_vectors_do() -> None:
    rng = random.Random(1)
    written_out = FiveTerms(FIRST, scale=SCALE, forgetting=0.995)
    vectors = RecursiveLeastSquares(np.array(FIRST), scale=np.array(SCALE), forgetting=0.995)
    for row in rows(500):
        seconds = rng.random()
        written_out.observe(row, seconds)
        vectors.observe(np.array(row), seconds)
    assert written_out.coefficients == pytest.approx(vectors.coefficients, rel=1e-6)


def test_ten_thousand_slices_that_are_alike_do_no_harm() -> None:
    truth = (3e-3, 1e-4, 2e-5, 1e-6, 2e-4)
    fit = FiveTerms(FIRST, scale=SCALE, forgetting=0.995)
    alike: Terms = (1.0, 1.0, 1.0, 100.0, 0.0)
    for row in [alike] * 10_000 + rows(500):
        fit.observe(row, float(np.dot(row, truth)))
    # As sure as of the first coefficients it remains, not surer: they keep a little weight.
    assert fit.coefficients == pytest.approx(truth, rel=2e-2)
