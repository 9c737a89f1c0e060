"""SCLS's model of serving time: its sum, its fit, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.estimators.bilinear import (
    Bilinear,
    BilinearFit,
    BilinearTime,
    RefinedTime,
    fit_bilinear,
)

EXAMPLE = BilinearTime(Bilinear(1.0, 2.0, 3.0, 10.0), Bilinear(1.0, 1.0, 2.0, 5.0))
TRUTH = BilinearTime(Bilinear(2e-6, 1e-4, 3e-5, 4e-3), Bilinear(3e-8, 2e-5, 1e-7, 2e-3))
GRID = [(rows, length) for rows in (1, 2, 4, 8, 16) for length in (32, 128, 512, 1024)]
BETWEEN = [(rows, length) for rows in (3, 12) for length in (64, 300, 800)]
NOTHING = Bilinear(0.0, 0.0, 0.0, 0.0)
NOT_GROWING = BilinearTime(Bilinear(-1.0, 4.0, -2.0, 1.0), NOTHING)


def measured(model: Bilinear, places, *, noise: float = 0.0) -> list[tuple[int, int, float]]:
    rng = np.random.default_rng(0)
    return [
        (rows, length, model.seconds(rows, length) * (1 + noise * rng.standard_normal()))
        for rows, length in places
    ]


def fitted(time: BilinearTime, *, noise: float = 0.0, places=GRID) -> BilinearFit:
    return fit_bilinear(
        measured(time.prefill, places, noise=noise),
        measured(time.decode, places, noise=noise),
        held_out_prefill=measured(time.prefill, BETWEEN),
        held_out_decode=measured(time.decode, BETWEEN),
        most_rows=16,
        steps=16,
    )


@given(rows=st.integers(1, 50), length=st.integers(0, 500), steps=st.integers(0, 60))
def test_the_closed_form_is_the_sum_over_the_steps(rows: int, length: int, steps: int) -> None:
    steps_s = sum(EXAMPLE.decode.seconds(rows, length + step) for step in range(1, steps + 1))
    whole_s = EXAMPLE.prefill.seconds(rows, length) + steps_s
    assert EXAMPLE.slice_s(rows, length, steps) == pytest.approx(whole_s)


@given(rows=st.integers(1, 50), length=st.integers(1, 500))
def test_the_worked_example(rows: int, length: int) -> None:
    by_hand = 5 * rows * length + 16 * rows + 11 * length + 50
    assert EXAMPLE.slice_s(rows, length, 4) == by_hand


def test_a_fit_finds_the_coefficients() -> None:
    fit = fitted(TRUTH)
    for part in ("prefill", "decode"):
        found, true = (getattr(time, part) for time in (fit.time, TRUTH))
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(true), rel=1e-6)
    assert not fit.not_negative
    assert fit.prefill_error.largest < 1e-6 and fit.prefill_error.num_points == 6


def test_a_fit_of_noisy_points_says_how_far_off_it_is() -> None:
    fit = fitted(TRUTH, noise=0.05)
    for error, model in (
        (fit.prefill_error, fit.time.prefill),
        (fit.decode_error, fit.time.decode),
    ):
        true = TRUTH.prefill if model is fit.time.prefill else TRUTH.decode
        off = [abs(model.seconds(*at) / true.seconds(*at) - 1) for at in BETWEEN]
        assert error.mean == pytest.approx(np.mean(off)) and error.largest == pytest.approx(
            max(off)
        )
        assert 0 < error.mean <= error.largest < 0.1


def test_what_falls_with_length_is_fitted_again_without_negative_coefficients() -> None:
    falling = BilinearTime(Bilinear(0.0, 1e-4, -1e-6, 1e-2), Bilinear(0.0, 1e-5, -1e-7, 2e-3))
    assert not falling.grows_with_length(most_rows=16, steps=16)
    fit = fitted(falling)
    assert fit.not_negative and fit.time.grows_with_length(most_rows=16, steps=16)
    assert min(*dataclasses.astuple(fit.time.prefill), fit.time.decode.length) >= 0
    assert fit.time.prefill.rows == pytest.approx(1e-4, rel=0.2)


def test_growth_is_judged_at_both_ends() -> None:
    assert EXAMPLE.grows_with_length(most_rows=64, steps=4)
    assert not NOT_GROWING.grows_with_length(most_rows=3, steps=1)
    wide = BilinearTime(Bilinear(-1.0, 0.0, 10.0, 0.0), NOTHING)
    assert wide.grows_with_length(most_rows=10, steps=1)
    assert not wide.grows_with_length(most_rows=11, steps=1)


def test_a_model_that_falls_is_not_refined() -> None:
    with pytest.raises(ValueError, match="falls as slices get longer; allowed: one that grows"):
        RefinedTime(NOT_GROWING, most_rows=3, steps=1)


@pytest.mark.parametrize(
    "places", [[], GRID[:3], [(1, length) for length in (32, 64, 128, 256)], [(1, 32)] * 9]
)
def test_points_that_say_too_little_are_refused(places) -> None:
    with pytest.raises(ValueError, match="tell|zero throughout"):
        fitted(TRUTH, places=places)


def test_a_fit_needs_held_out_points() -> None:
    points = measured(TRUTH.prefill, GRID)
    with pytest.raises(ValueError, match="to judge a fit by: got none"):
        fit_bilinear(
            points,
            points,
            held_out_prefill=[],
            held_out_decode=points,
            most_rows=4,
            steps=4,
        )


def test_refining_follows_a_device_that_got_slower() -> None:
    slower = BilinearTime(
        *(
            Bilinear(*(1.5 * value for value in dataclasses.astuple(part)))
            for part in (TRUTH.prefill, TRUTH.decode)
        )
    )
    refined = RefinedTime(TRUTH, most_rows=16, steps=64)
    rng = np.random.default_rng(1)
    for _ in range(300):
        rows, length, steps = int(rng.integers(1, 17)), int(rng.integers(8, 900)), 16
        refined.observe(rows, length, steps, slower.slice_s(rows, length, steps))
    assert refined.time.slice_s(8, 400, 16) == pytest.approx(slower.slice_s(8, 400, 16), rel=0.02)


def test_refining_keeps_to_models_that_grow() -> None:
    refined = RefinedTime(TRUTH, most_rows=16, steps=16)
    for length in (800, 50) * 50:  # twice as long takes half the time, it is told
        refined.observe(4, length, 16, 1.0 / length)
        assert refined.time.grows_with_length(most_rows=16, steps=16)
