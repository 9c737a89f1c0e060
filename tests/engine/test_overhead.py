"""What a slice costs beyond steps and prompt tokens, measured before anything is served."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.buckets import Bucket, Buckets, make_buckets
from jaxserve.engine.build import build_engine
from jaxserve.engine.measure import Limits
from jaxserve.engine.overhead import predicted_overhead
from jaxserve.engine.scripted import Pace
from jaxserve.schedulers.estimators.fitted_time import Curve, FittedTime
from jaxserve.schedulers.estimators.serving_time import UNMEASURED, SliceOverhead

TRUTH = FittedTime(
    dispatch_s=2e-3,
    step_s=Curve((1, 8, 16), (4e-3, 5e-3, 6e-3)),
    attended_s=1e-8,
    prompt_step_s=8e-3,
    prompt_token_s=2e-4,
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


def overhead(**changes) -> SliceOverhead:
    limits = dataclasses.replace(LIMITS, **changes)
    pace = Pace(TRUTH, Buckets(limits.buckets, tile=limits.tile))
    return predicted_overhead(pace, limits, vocab_size=97)


def test_both_parts_are_told_from_steps_and_tokens() -> None:
    found = overhead()
    assert found.dispatch_s == pytest.approx(2e-3, rel=1e-3)
    assert found.prompts_s == pytest.approx(8e-3, rel=1e-3)


def test_a_context_that_is_no_longer_than_the_largest_program_does() -> None:
    assert overhead(max_context=300).prompts_s == pytest.approx(8e-3, rel=1e-3)


def test_with_one_program_for_prompts_all_of_it_counts() -> None:
    found = overhead(buckets=(Bucket(1, 0), Bucket(16, 0), Bucket(16, 4)), max_context=128)
    assert found.prompts_s == pytest.approx(8e-3 + 128 * 2e-4, rel=1e-3)


def test_one_step_at_a_time_tells_nothing_and_asks_for_nothing() -> None:
    assert overhead(max_steps=1) == UNMEASURED


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
    logged = json.loads(log.read_text().splitlines()[0])["config"]["overhead"]
    assert SliceOverhead(**logged) == driver.core.config.overhead
    assert (driver.core.config.overhead == UNMEASURED) == (executor == "mock")
    assert any(line.startswith("a slice: ") for line in said) == (executor == "jax")
