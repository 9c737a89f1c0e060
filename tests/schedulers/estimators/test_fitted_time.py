"""Slice times fitted to points: the truth is found, costs never fall, and noise is noise."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.estimators.bilinear import Grid, bilinear_of
from jaxserve.schedulers.estimators.fitted_time import (
    Curve,
    FittedTime,
    error_on,
    fit_host,
    fit_time,
)
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import HostTime, NoisyTime, SliceTime

TRUTH = FittedTime(
    dispatch_s=1e-3,
    step_s=Curve((1, 8, 16, 32), (2e-3, 5e-3, 6e-3, 6.5e-3)),
    attended_s=1e-6,
    prompt_step_s=8e-3,
    prompt_row_s=1e-4,
    prompt_token_s=2e-4,
    prompt_attended_s=2e-7,
)
HOST = HostTime(2e-4, 1e-5, 2e-6, 3e-7)


def shapes(count: int, *, seed: int = 0, most_rows: int = 32) -> list[SliceShape]:
    rng = np.random.default_rng(seed)
    sizes = [rows for rows in (1, 8, 16, 32) if rows <= most_rows]
    made = []
    for _ in range(count):
        rows, steps = int(rng.choice(sizes)), int(rng.choice((1, 2, 8, 16)))
        prompt = int(rng.choice((0, 128, 512)))
        attended = rows * steps * int(rng.integers(1, 500))
        made.append(SliceShape(steps, rows, attended, prompt, prompt * int(rng.integers(1, 300))))
    return made


def measured(count: int, *, noise: float = 0.0, **which) -> list[tuple[SliceShape, float]]:
    rng = np.random.default_rng(1)
    return [
        (shape, TRUTH.slice_s(shape) * math.exp(noise * rng.standard_normal()))
        for shape in shapes(count, **which)
    ]


def test_the_truth_is_found() -> None:
    found = fit_time(measured(80))
    assert found.step_s.sizes == TRUTH.step_s.sizes
    assert found.step_s.seconds == pytest.approx(TRUTH.step_s.seconds, rel=1e-6)
    for name in ("dispatch_s", "attended_s", "prompt_step_s", "prompt_row_s", "prompt_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-6)
    assert isinstance(found, SliceTime)


def test_noise_costs_less_than_itself_and_nothing_becomes_negative() -> None:
    found = fit_time(measured(120, noise=0.1))
    error = error_on(found, measured(200, seed=9))
    assert 0 < error.mean < 0.05 and error.num_points == 200
    values = [found.dispatch_s, found.attended_s, found.prompt_attended_s, *found.step_s.seconds]
    assert min(values) >= 0 and list(found.step_s.seconds) == sorted(found.step_s.seconds)


def test_what_is_out_of_range_is_told_from_terms_that_go_on() -> None:
    found = fit_time(measured(80, most_rows=16))
    longer = SliceShape(64, 16, 64 * 16 * 4000, 0)
    assert found.slice_s(longer) == pytest.approx(TRUTH.slice_s(longer), rel=1e-6)
    wider = found.slice_s(SliceShape(1, 64, 0, 0))
    assert wider == pytest.approx(1e-3 + 6e-3 + 48 * (6e-3 - 5e-3) / 8)  # on along the last stretch


@cache
def noisy_fit() -> FittedTime:
    return fit_time(measured(60, noise=0.2))


@given(
    steps=st.integers(1, 64),
    rows=st.integers(1, 200),
    prompt=st.integers(0, 2000),
    attended=st.integers(0, 10**7),
)
def test_more_of_anything_takes_no_less(steps: int, rows: int, prompt: int, attended: int) -> None:
    time = noisy_fit()
    shape = SliceShape(steps, rows, attended, prompt, 10 * prompt)
    for name in ("steps", "rows", "attended_tokens", "prefill_attended_tokens"):
        more = shape._replace(**{name: getattr(shape, name) + 1})
        assert time.slice_s(more) >= time.slice_s(shape) - 1e-12


def test_one_size_of_prompt_steps_is_enough() -> None:
    shapes = [shape for shape, _ in measured(80) if shape.prefill_tokens in (0, 512)]
    found = fit_time([(shape, TRUTH.slice_s(shape)) for shape in shapes])
    assert error_on(found, [(shape, TRUTH.slice_s(shape)) for shape in shapes]).largest < 1e-6


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_points_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="got none|tell"):
        fit_time(measured(count))


def test_the_hosts_part_is_fitted_or_where_points_do_not_tell_its_mean() -> None:
    points = [(shape, HOST.seconds(shape)) for shape in shapes(50)]
    assert fit_host(points).row_s == pytest.approx(HOST.row_s, rel=1e-6)
    mean = fit_host(points[:1] * 3)
    assert mean.slice_s == pytest.approx(points[0][1]) and mean.row_s == 0.0
    shape = SliceShape(4, 8, 0, 100)
    time = replace(TRUTH, host=HOST)
    assert time.host_s(shape) == pytest.approx(2e-4 + 8 * (1e-5 + 4 * 2e-6) + 100 * 3e-7)


def test_noise_is_repeatable_and_has_the_spread_that_was_asked_for() -> None:
    shape = SliceShape(8, 8, 1000, 0)
    draws = [NoisyTime(TRUTH, spread=0.1, seed=3) for _ in range(2)]
    times = np.array([[time.slice_s(shape) for _ in range(4000)] for time in draws])
    assert (times[0] == times[1]).all()
    relative = times[0] / TRUTH.slice_s(shape)
    assert relative.mean() == pytest.approx(1.0, abs=0.01)
    assert np.abs(relative - np.median(relative)).mean() == pytest.approx(0.1, rel=0.05)
    assert draws[0].host_s(shape) == TRUTH.host_s(shape)


def test_a_static_batch_of_a_bilinear_truth_is_fitted_to_the_last_digit() -> None:
    straight = replace(TRUTH, step_s=Curve((1, 32), (2e-3, 5e-3)), prompt_attended_s=0.0)
    fit = bilinear_of(straight, Grid())
    assert fit.prefill_error.largest < 1e-6 and fit.decode_error.largest < 1e-6
    assert fit.time.decode.rows_length == pytest.approx(straight.attended_s, rel=1e-6)
    assert fit.time.prefill.rows_length == pytest.approx(straight.prompt_token_s, rel=1e-6)


def test_a_slower_device_is_the_same_one_scaled() -> None:
    time = replace(TRUTH, host=HOST)
    slower = time.scaled(1.5)
    for shape in shapes(20):
        assert slower.slice_s(shape) == pytest.approx(1.5 * time.slice_s(shape))
        assert slower.host_s(shape) == time.host_s(shape)
