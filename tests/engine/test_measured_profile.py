"""Measuring slices: points run as the programs they are meant for, and a profile in seconds."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxserve.clock import MonotonicClock
from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.batch import BatchShape
from jaxserve.engine.buckets import Bucket, Buckets, make_buckets
from jaxserve.engine.build import build_engine
from jaxserve.engine.devices import open_mesh
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.measure import (
    Limits,
    Point,
    SliceBench,
    make_points,
    measure_points,
    prefill_points,
    spread_of,
)
from jaxserve.engine.measure_host import measure_core, read_live
from jaxserve.engine.measured_profile import live_error, measure_profile, with_live_host
from jaxserve.engine.scripted import Pace, ScriptedExecutor
from jaxserve.models.config import SHAPES
from jaxserve.models.info import ModelInfo
from jaxserve.models.profile import Profile, find_profile
from jaxserve.models.sources import load_weights, parse_source
from jaxserve.request import Request, SamplingParams
from jaxserve.schedulers.estimators.fitted_time import Curve, FittedTime, fit_time
from jaxserve.schedulers.estimators.serving_time import SliceShape

TINY = SHAPES["tiny"]
TRUTH = FittedTime(
    dispatch_s=1e-3,
    step_s=Curve((1, 8, 16), (2e-3, 5e-3, 6e-3)),
    attended_s=1e-6,
    prompt_step_s=8e-3,
    prompt_row_s=1e-4,
    prompt_token_s=2e-4,
    prompt_attended_s=2e-7,
)
LIMITS = Limits(
    buckets=make_buckets(16, 16),
    tile=32,
    max_rows=16,
    max_steps=16,
    max_context=512,
    page_size=16,
    num_pages=256,
)


@pytest.fixture
def bench() -> SliceBench:
    pace = Pace(TRUTH, Buckets(LIMITS.buckets, tile=LIMITS.tile))
    device = ScriptedExecutor(vocab_size=97, pace=pace, now=lambda: 0.0, sleep=lambda _: None)
    return SliceBench(device, LIMITS)


def test_every_program_gets_points_that_it_alone_is_taken_for(bench: SliceBench) -> None:
    points = make_points(LIMITS, each=4, seed=0)
    ran = Counter()
    for point in points:
        shape, seconds = bench.run(point)
        ran[shape.rows, shape.prefill_tokens // LIMITS.tile] += 1
        assert seconds == pytest.approx(TRUTH.slice_s(shape))
        assert shape.steps == point.steps and point.longest + point.steps <= LIMITS.max_context
    assert ran == {(bucket.rows, bucket.tiles): 4 for bucket in LIMITS.buckets}


def test_a_shape_counts_what_each_step_attends_to(bench: SliceBench) -> None:
    shape, _ = bench.run(Point(3, (10, 20), ((5, 4),)))
    decoding = (10 + 11 + 12) + (20 + 21 + 22)
    started = 10 + 11  # its first token comes from the prompt
    assert shape == SliceShape(3, 16, decoding + started, 128, 6 + 7 + 8 + 9)


def test_rows_are_sampled_as_asked_each_with_a_seed_of_its_own() -> None:
    device, plans = ScriptedExecutor(vocab_size=97), []
    run, device.dispatch = device.dispatch, lambda plan: plans.append(plan) or run(plan)
    params = SamplingParams(temperature=0.8, top_p=0.9, ignore_eos=True)
    bench = SliceBench(device, LIMITS, params=params)
    bench.run(Point(2, (10, 20), ((5, 4),)))
    started = [row for plan in plans for row in plan.rows if row.start is not None]
    assert [(row.start.params, row.start.seed) for row in started] == [
        (params, row.slot) for row in started
    ]
    assert sorted(row.slot for row in started) == [0, 1, 2]
    assert bench.made == [[3, 4], [3, 4], [2, 3]]  # one more each time; prompts are ones


def test_rows_have_pages_of_their_own_in_a_pool_far_smaller_than_their_longest() -> None:
    limits = replace(LIMITS, max_context=131_072)
    device = ScriptedExecutor(vocab_size=97)
    plans = []
    run, device.dispatch = device.dispatch, lambda plan: plans.append(plan) or run(plan)
    SliceBench(device, limits).run(Point(4, (200,) * 16))
    pages = [page for row in plans[-1].rows for page in row.pages]
    assert len(pages) == len(set(pages)) == 16 * 13


def test_measured_points_give_the_truth_back(bench: SliceBench) -> None:
    points = make_points(LIMITS, each=3, seed=0)
    said: list[str] = []
    made = measure_points(bench, points, seconds=0.0, clock=lambda: 0.0, progress=said.append)
    assert all(len(each.seconds) == 3 for each in made) and max(spread_of(made)) == 0.0
    found = fit_time([each.measured for each in made])
    assert found.step_s.seconds == pytest.approx(TRUTH.step_s.seconds, rel=1e-6)
    assert said


def test_a_static_batch_is_prefilled_in_whole_tiles_of_the_budget() -> None:
    points = prefill_points(LIMITS, 3, 200)
    taken = Counter()
    for point in points:
        assert sum(-(-size // 32) for _, size in point.chunks) <= 16
        for start, size in point.chunks:
            taken[start] += size
    assert sum(taken.values()) == 600 and len(points) == 2


def config(**scheduler) -> EngineConfig:
    return EngineConfig(
        model="random:tiny",
        mesh="tp=1",
        cache=CacheConfig(page_size=16, num_pages=128),
        scheduler=SchedulerConfig(
            max_rows=4, max_prefill_tokens=64, slice_steps=8, slicing="fixed", **scheduler
        ),
    )


@pytest.fixture(scope="module")
def measured() -> Profile:
    """Of two programs, which compile soon."""
    info = ModelInfo(
        name="tiny",
        source="random:tiny",
        config=TINY,
        dtype="float32",
        num_pages=128,
        page_size=16,
        programs=4,
        kernels={"paged_attention": "cpu"},
        platform="cpu",
        device_kind="cpu",
        num_devices=1,
    )
    mesh = open_mesh("tp=1", TINY)
    executor = JaxExecutor(
        TINY,
        load_weights(parse_source("random:tiny"), TINY, dtype="float32", seed=0, mesh=mesh),
        mesh=mesh,
        shape=BatchShape(tile=32, table_pages=32, step_buffer=8, max_rows=4),
        buckets=(Bucket(4, 0), Bucket(4, 2)),
        num_pages=128,
        page_size=16,
        kernels="auto",
        dtype="float32",
    )
    executor.compile_all(lambda _: None, threads=2)
    done = measure_profile(
        config(),
        executor,
        info,
        buckets=executor.buckets,
        seconds=1.0,
        progress=lambda _: None,
        points_each=12,
    )
    assert done.num_slices >= 3 * done.num_points
    return done.profile


def test_a_profile_of_this_device(measured: Profile, tmp_path: Path) -> None:
    measured.check_shape(TINY, dtype="float32")
    assert measured.kind == "measured" and measured.device == "cpu" and measured.num_devices == 1
    assert measured.page_size == 16 and measured.num_pages == 128
    assert measured.kernels == {"paged_attention": "cpu"} and "jax" in measured.versions
    short, long = SliceShape(1, 4, 40, 0), SliceShape(8, 4, 8 * 2000, 64, 4000)
    assert 0 < measured.time.slice_s(short) < measured.time.slice_s(long) < 1
    assert measured.time.host_s(short) > 0
    assert measured.errors.spread and measured.errors.held_out and measured.spread > 0
    measured.save(tmp_path / "tiny.json")
    assert find_profile(str(tmp_path / "tiny.json")) == measured


def test_the_cores_own_work_is_measured_without_a_device() -> None:
    pace = Pace(TRUTH, Buckets(make_buckets(4, 2), tile=32))
    points = measure_core(config(), TINY, num_pages=128, pace=pace, num_requests=12)
    assert len(points) > 20 and all(0 < seconds < 1 for _, seconds in points)
    assert {shape.rows for shape, _ in points} <= set(range(1, 5))
    assert any(shape.prefill_tokens for shape, _ in points)


def test_a_live_log_tells_what_the_host_cost(write_profile, tmp_path: Path) -> None:
    log, name = tmp_path / "events.jsonl", write_profile("tiny", step_s=0.002)
    done: list[str] = []
    engine = EngineConfig(
        **{
            **{field: getattr(config(), field) for field in ("model", "cache", "scheduler")},
            "executor": "paced",
            "profile": name,
            "event_log": str(log),
        }
    )

    def report(number, deltas, rejections) -> None:
        done.extend(delta.request_id for delta in deltas if delta.finish is not None)

    driver = build_engine(engine, on_report=report, on_failure=done.append, progress=lambda _: None)
    driver.start()
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    for i in range(4):
        driver.submit(
            Request(request_id=str(i), prompt=np.arange(1, 20 + i, dtype=np.int32), params=params)
        )
    clock = MonotonicClock()
    until_s = clock.now() + 10
    while len(done) < 4 and clock.now() < until_s:
        driver.call(lambda core: None).result(timeout=5)
    driver.stop()
    slices = read_live(log)
    profile = find_profile(name)
    assert len(slices) >= 3 and live_error(profile, slices).largest < 1e-9
    assert sum(each.gap_s for each in slices) > 0.5 * sum(each.slice_s for each in slices)
    live = with_live_host(profile, slices)
    shape, handled = slices[0].shape, slices[0].handled
    assert live.key != profile.key
    assert live.time.slice_s(shape) == pytest.approx(slices[0].slice_s)
    assert 0 < live.time.host_s(handled) < 0.1  # its processor's seconds, not those it slept
    # On the device's core the host costs what a slice takes longer than the device; beside other
    # work its own cost may be lost in how late a sleep ends.
    shared = with_live_host(
        replace(profile, host_overlaps=False),
        [replace(each, gap_s=each.gap_s + 0.01) for each in slices],
    )
    assert 0 <= shared.time.host_s(handled) < 1
