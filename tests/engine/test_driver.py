"""The dispatch thread, its log, and that the log replays."""

import queue
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxserve.clock import MonotonicClock
from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.build import build_engine
from jaxserve.engine.driver import EngineDriver
from jaxserve.engine.event_log import plan_from_json, plan_to_json, read_events, replay
from jaxserve.errors import BadRequest, ConfigError
from jaxserve.request import FinishReason, Request, SamplingParams


class Reports:
    """Collects what a driver says, and waits for requests to end."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: queue.Queue = queue.Queue()
        self.rejected: queue.Queue = queue.Queue()
        self.failed: queue.Queue = queue.Queue()

    def __call__(self, dispatch, deltas, rejections) -> None:
        for delta in deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.tokens)
            if delta.finish is not None:
                self.finished.put(delta)
        for rejection in rejections:
            self.rejected.put(rejection)


def start(reports: Reports, **config) -> EngineDriver:
    defaults = dict(
        model="random:tiny",
        executor="mock",
        cache=CacheConfig(page_size=16, num_pages=64),
        scheduler=SchedulerConfig(max_rows=4),
    )
    driver = build_engine(
        EngineConfig(**{**defaults, **config}),
        on_report=reports,
        on_failure=reports.failed.put,
        progress=lambda _: None,
    )
    driver.start()
    return driver


def request(name: str, *, tokens: int = 5, **params) -> Request:
    params = SamplingParams(max_tokens=20, **params)
    return Request(request_id=name, prompt=np.arange(tokens, dtype=np.int32), params=params)


def test_requests_are_served_and_refusals_reported() -> None:
    reports = Reports()
    driver = start(reports)
    for i in range(9):
        driver.submit(request(f"r{i}"))
    driver.submit(request("bad", tokens=0))
    for _ in range(9):
        assert reports.finished.get(timeout=10).finish is FinishReason.LENGTH
    refused = reports.rejected.get(timeout=10)
    assert refused.request_id == "bad" and isinstance(refused.error, BadRequest)
    assert all(tokens == list(range(5, 25)) for tokens in reports.tokens.values())
    statistics = driver.call(lambda core: core.statistics()).result(timeout=10)
    assert statistics.finished == 9 and statistics.running == statistics.waiting == 0
    driver.stop()


def test_an_abort_reaches_a_running_request(write_profile) -> None:
    reports = Reports()
    profile = write_profile("tiny", step_s=0.005)
    scheduler = SchedulerConfig(slicing="fixed", slice_steps=2)
    driver = start(reports, executor="paced", profile=profile, scheduler=scheduler)
    driver.submit(request("long", tokens=3))
    driver.abort("long")
    assert reports.finished.get(timeout=10).finish is FinishReason.ABORT
    assert driver.call(lambda core: core.statistics()).result(timeout=10).running == 0
    driver.stop()


def test_a_question_that_fails_does_not_stop_the_engine() -> None:
    reports = Reports()
    driver = start(reports)
    with pytest.raises(ZeroDivisionError):
        driver.call(lambda core: 1 / 0).result(timeout=10)
    driver.submit(request("r"))
    assert reports.finished.get(timeout=10).finish is FinishReason.LENGTH
    driver.stop()


def test_a_broken_device_is_told_once_and_ends_the_thread() -> None:
    reports = Reports()
    driver = start(reports)
    driver._executor.dispatch = None  # the next slice cannot be dispatched
    driver.submit(request("r"))
    assert isinstance(reports.failed.get(timeout=10), TypeError)
    driver._thread.join(timeout=10)
    assert not any(thread.name == "dispatch" for thread in threading.enumerate())


def test_the_event_log_replays_to_the_same_plans(tmp_path: Path) -> None:
    reports, path = Reports(), tmp_path / "events.jsonl"
    driver = start(reports, event_log=str(path), scheduler=SchedulerConfig(max_rows=3))
    for i in range(12):
        driver.submit(request(f"r{i}", tokens=1 + 5 * i, seed=i, temperature=0.5, n=1 + i % 2))
    driver.abort("r3")
    driver.limit_row("r4", 0, 2)
    for _ in range(12 + 6):
        reports.finished.get(timeout=10)
    driver.stop()
    pairs = list(replay(read_events(path)))
    assert sum(logged is not None for logged, _ in pairs) > 5
    for logged, planned in pairs:
        assert logged == planned
    plan = next(logged for logged, _ in pairs if logged is not None)
    assert plan_to_json(plan_from_json(plan)) == plan


def test_a_log_of_another_kind_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"event": "open", "schema": "something/2"}\n')
    with pytest.raises(ConfigError, match=r"other.jsonl, line 1: schema is 'something/2'"):
        list(read_events(path))


def test_an_idle_driver_wakes_up_for_a_deadline() -> None:
    reports, clock = Reports(), MonotonicClock()
    driver = start(reports, scheduler=SchedulerConfig(max_rows=1, queue_timeout_s=0.05))
    assert clock.now() > 0
    driver.submit(request("r"))
    assert reports.finished.get(timeout=10).request_id == "r"
    driver.stop()
