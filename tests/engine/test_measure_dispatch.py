"""What a slice takes beyond its steps, measured before anything is served."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.buckets import Buckets, make_buckets
from jaxserve.engine.build import build_engine
from jaxserve.engine.measure import Limits
from jaxserve.engine.measure_dispatch import predicted_dispatch
from jaxserve.engine.scripted import Pace
from jaxserve.schedulers.estimators.fitted_time import Curve, FittedTime
from jaxserve.schedulers.estimators.serving_time import UNMEASURED_S, SliceShape

TRUTH = FittedTime(
    dispatch_s=2e-3,
    step_s=Curve((1, 8, 16), (4e-3, 5e-3, 6e-3)),
    attended_s=1e-8,
)
LIMITS = Limits(
    buckets=make_buckets(16, 16),
    tile=32,
    max_rows=16,
    max_steps=16,
    max_context=1024,
    page_size=16,
    num_pages=256,
)


def dispatch_s(**changes) -> float:
    limits = dataclasses.replace(LIMITS, **changes)
    pace = Pace(TRUTH, Buckets(limits.buckets, tile=limits.tile))
    return predicted_dispatch(pace, limits, vocab_size=97)


@pytest.mark.parametrize("max_steps", [2, 16])
def test_a_dispatch_is_told_from_steps(max_steps: int) -> None:
    assert dispatch_s(max_steps=max_steps) == pytest.approx(2e-3, rel=1e-3)


def test_one_step_at_a_time_tells_nothing_and_asks_for_nothing() -> None:
    assert dispatch_s(max_steps=1) == UNMEASURED_S


@pytest.mark.parametrize("executor", ["jax", "paced", "mock"])
def test_an_engine_says_and_logs_what_it_plans_with(executor: str, tmp_path: Path) -> None:
    log, said = tmp_path / "events.jsonl", []
    config = EngineConfig(
        model="random:llama-14m" if executor == "paced" else "random:tiny",
        executor=executor,
        profile="cpu-1core-llama-14m-f32" if executor == "paced" else "",
        mesh="tp=1" if executor == "jax" else "auto",
        cache=CacheConfig(page_size=64, num_pages=64),
        scheduler=SchedulerConfig(max_rows=1, max_prefill_tokens=32, slice_steps=8),
        event_log=str(log),
    )
    driver = build_engine(
        config, on_report=lambda *_: None, on_failure=lambda _: None, progress=said.append
    )
    driver.start()
    driver.stop()
    logged = json.loads(log.read_text().splitlines()[0])["config"]["dispatch_s"]
    assert logged == driver.core.config.dispatch_s
    assert (logged == UNMEASURED_S) == (executor == "mock")
    assert any(line.startswith("a slice takes ") for line in said) == (executor == "jax")


def test_noise_makes_no_dispatch_longer_than_a_slice() -> None:
    falling = FittedTime(dispatch_s=5e-3, step_s=Curve((1,), (-1e-4,)), attended_s=0.0)
    pace = Pace(falling, Buckets(LIMITS.buckets, tile=LIMITS.tile))
    shortest_s = falling.slice_s(SliceShape(1, 1, 8, 0))
    assert predicted_dispatch(pace, LIMITS, vocab_size=97) == pytest.approx(shortest_s)


@pytest.mark.parametrize("slicing", ["adaptive", "fixed", "sequence"])
def test_it_is_measured_for_slicings_that_weigh_it(slicing: str) -> None:
    config = EngineConfig(
        model="random:llama-14m",
        executor="paced",
        profile="cpu-1core-llama-14m-f32",
        cache=CacheConfig(page_size=64, num_pages=64),
        scheduler=SchedulerConfig(slicing=slicing),
    )
    driver = build_engine(
        config, on_report=lambda *_: None, on_failure=lambda _: None, progress=lambda _: None
    )
    assert (driver.core.config.dispatch_s != UNMEASURED_S) == (slicing == "adaptive")
