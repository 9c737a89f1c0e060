"""A live engine's log, run once more: the simulator decides as the engine did."""

import queue
import time
from pathlib import Path

import numpy as np
import pytest

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.build import build_engine
from jaxserve.request import Request, SamplingParams
from jaxserve.schedulers.prefix_tree import page_keys
from jaxserve.sim.rerun import read_recorded, rerun

PAGE = 16


def request(number: int, rng: np.random.Generator) -> Request:
    shared = np.full(PAGE * (number % 3), 7, np.int32)
    prompt = np.concatenate([shared, rng.integers(3, 200, rng.integers(1, 60), dtype=np.int32)])
    params = SamplingParams(max_tokens=int(rng.integers(1, 40)), seed=number, temperature=0.0)
    keys = page_keys(prompt, page_size=PAGE, scope="all", model="tiny")
    return Request(
        request_id=str(number), prompt=prompt, params=params, page_keys=tuple(keys), scope="all"
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        {"order": "dlpm"},
        {"order": "lpm", "slicing": "fixed", "slice_steps": 4},
        {"slicing": "iteration", "admission": "reserve_prompt"},
        {"overlap": False},
    ],
    ids=str,
)
def test_every_plan_of_a_live_engine_is_made_again(
    tmp_path: Path, write_profile, scheduler
) -> None:
    """A real dispatch thread, at the pace of a profile; requests and aborts come when they come."""
    ended: queue.Queue = queue.Queue()
    log = tmp_path / "events.jsonl"
    driver = build_engine(
        EngineConfig(
            model="random:tiny",
            executor="paced",
            profile=write_profile("tiny", step_s=0.0005),
            event_log=str(log),
            cache=CacheConfig(page_size=PAGE, num_pages=24),
            scheduler=SchedulerConfig(max_rows=4, max_prefill_tokens=64, **scheduler),
        ),
        on_report=lambda number, deltas, rejections: [
            ended.put(delta.request_id) for delta in deltas if delta.finish is not None
        ],
        on_failure=ended.put,
        progress=lambda line: None,
    )
    driver.start()
    rng = np.random.default_rng(0)
    for number in range(25):
        driver.submit(request(number, rng))
        if number % 6 == 5:
            driver.abort(str(number - 1))
        time.sleep(float(rng.exponential(0.003)))
    assert {ended.get(timeout=20) for _ in range(25)} == {str(number) for number in range(25)}
    driver.stop()
    recorded = read_recorded(log)
    pairs = list(rerun(recorded))
    assert len(pairs) == len(recorded.plans) > 10
    assert all(live == again for live, again in pairs)
