"""A run to report on: three replicas that serve four clients, first come first served."""

import numpy as np
import pytest

from jaxserve.report.measure import measure
from jaxserve.report.options import Limits, MeasureOptions
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import About, Report
from jaxserve.workload.work import Work

NUM_REQUESTS = 600
STEP_S = 0.01


def make_work(number: int, *, client: str, prompt: int) -> Work:
    return Work(
        number=number,
        arrival_s=0.0,
        prompt_tokens=prompt,
        output_tokens=60,
        max_tokens=60,
        client=client,
    )


def record_queue(recorder: Recorder, *, seed: int = 0) -> None:
    """Requests with random lengths; each replica runs those it has in slices of 8 steps."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(0.02, NUM_REQUESTS))
    works = [
        make_work(number, client=f"client {random.integers(4)}", prompt=int(random.integers(8, 99)))
        for number in range(NUM_REQUESTS)
    ]
    for replica in range(3):
        now_s, waiting = 0.0, list(range(replica, NUM_REQUESTS, 3))
        running: list[list[int]] = []
        while waiting or running:
            while waiting and len(running) < 6 and arrivals[waiting[0]] <= now_s:
                running.append([waiting.pop(0), int(random.integers(1, 60))])
            if not running:
                now_s = float(arrivals[waiting[0]])
                continue
            end_s = now_s + 8 * STEP_S
            for row in running:
                recorder.delivered(row[0], end_s, min(8, row[1]))
                row[1] -= 8
                if row[1] <= 0:
                    recorder.ended(row[0], end_s, "length", 4, replica=replica, queue_s=0.5)
            tokens = {"prefill_tokens": 10, "output_tokens": 8 * len(running)}
            recorder.slice(replica, now_s, end_s, steps=8, rows=len(running), **tokens)
            recorder.fairness(
                replica, end_s, clients=2, window_s=1.0, gap=10.0 + replica, bound=40.0, jain=0.9
            )
            running = [row for row in running if row[1] > 0]
            now_s = end_s
        recorder.replica(replica, {"preemptions": 2.0})
    for work, arrival_s in zip(works, arrivals, strict=True):
        recorder.sent(work, float(arrival_s))


def make_about(**changes) -> About:
    values = {
        "kind": "simulated",
        "title": "fcfs",
        "configuration": {"order": "fcfs"},
        "workload": {"name": "queue"},
        "versions": {"jaxserve": "1"},
        "seeds": {"workload": 0},
    }
    return About(**(values | changes))


def make_report(*, seed: int = 0, **changes) -> Report:
    recorder = Recorder()
    record_queue(recorder, seed=seed)
    options = MeasureOptions(limits=Limits(ttft_s=0.5))
    return measure(recorder, make_about(**changes), options)


@pytest.fixture(scope="session")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="session")
def other() -> Report:
    return make_report(seed=1, title="other", configuration={"order": "lpm"})
