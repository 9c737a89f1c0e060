"""Training: it learns, repeats itself under a seed, ends on time and keeps the best."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jaxserve.clock import Clock, MonotonicClock, VirtualClock
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.training import StepReport, Trainer, TrainingPlan
from jaxserve.models.training_text import encode_turns, train_tokenizer

TURNS = [f"{name}:\n{name.title()} says good day to you, sir." for name in ("ANN", "BOB", "CID")]
TOKENIZER = train_tokenizer(TURNS, vocab_size=300)
STREAM = encode_turns(TOKENIZER, TURNS * 20)
CONFIG = ModelConfig(
    name="small",
    num_layers=1,
    width=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_width=48,
    vocab_size=TOKENIZER.get_vocab_size(),
    max_context=32,
    tied_embeddings=True,
)
PLAN = TrainingPlan(
    steps=40,
    tokens_per_step=256,
    row_tokens=32,
    long_row_tokens=32,
    peak_learning_rate=0.02,
    test_rows=1000,
)


@pytest.fixture(scope="module", autouse=True)
def promotion() -> Iterator[None]:
    """Optax counts steps in int32 and multiplies floats by them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def trainer(plan: TrainingPlan, clock: Clock) -> Trainer:
    return Trainer(CONFIG, plan, streams=[STREAM], held_out=[STREAM], clock=clock)


@pytest.fixture(scope="module")
def trained() -> tuple[Trainer, list[StepReport]]:
    run = trainer(PLAN, MonotonicClock())
    return run, list(run.run())


def test_training_learns_a_repetitive_text(trained: tuple[Trainer, list[StepReport]]) -> None:
    _, reports = trained
    assert [report.step for report in reports] == list(range(1, 41))
    assert reports[0].nats_per_token > 5  # about ln 300: nothing known yet
    assert reports[-1].nats_per_token < 1


def test_the_best_tested_weights_are_kept(trained: tuple[Trainer, list[StepReport]]) -> None:
    run, reports = trained
    tests = [report for report in reports if report.bits_per_byte is not None]
    assert len(tests) == PLAN.num_tests and tests[-1].step == PLAN.steps
    best = min(report.bits_per_byte for report in tests if report.bits_per_byte is not None)
    assert [r.bits_per_byte for r in tests if r.is_best][-1] == best
    assert run.evaluate_best() == pytest.approx(best, rel=1e-6)  # all rows were tested
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.best_params)} == {"bfloat16"}


def test_a_run_can_go_on_from_the_weights_of_another(
    trained: tuple[Trainer, list[StepReport]],
) -> None:
    run, reports = trained
    start = jax.tree.map(lambda leaf: leaf.astype("float32"), run.best_params)
    again = Trainer(
        CONFIG,
        PLAN,
        streams=[STREAM],
        held_out=[STREAM],
        clock=MonotonicClock(),
        start_params=start,
    )
    assert again.evaluate_best() == run.evaluate_best()
    assert next(again.run()).nats_per_token < 2 * reports[-1].nats_per_token


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not() -> None:
    plan = dataclasses.replace(PLAN, steps=3)
    first, second, other = (
        [r.nats_per_token for r in trainer(p, MonotonicClock()).run()]
        for p in (plan, plan, dataclasses.replace(plan, seed=1))
    )
    assert first == second
    assert not np.allclose(first, other)


def test_a_run_by_minutes_ends_by_the_clock() -> None:
    clock = VirtualClock()
    plan = dataclasses.replace(PLAN, steps=None, minutes=1.0, num_tests=1)
    progress = []
    for report in trainer(plan, clock).run():
        progress.append(report.progress)
        clock.advance(15.0)
    assert progress == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    plan = TrainingPlan(steps=1, peak_learning_rate=1.0, warm_up_share=0.1)
    rates = [plan.learning_rate(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and max(rates) == rates[10] == 1 and abs(rates[-1]) < 1e-9
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "got steps=None, minutes=None; give one of them"),
        ({"steps": 1, "minutes": 1.0}, "got steps=1, minutes=1.0; give one of them"),
        ({"steps": 1, "tokens_per_step": 1000}, "got 1000; allowed: a multiple of 256"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingPlan(**fields)
