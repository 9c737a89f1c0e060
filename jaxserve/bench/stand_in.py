"""Stand-ins for what the workload and report floors bring: to be replaced, name by name.

`make_workload`, `make_feed` and `draw_tokens` stand for `jaxserve.workload`; `read_limits` and
`show_run` for `jaxserve.report`; `show_against` for the simulator.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.bench.sweep import Limits
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.report.recorder import Recorder
from jaxserve.server_config import BenchOutputConfig, BenchWorkloadConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work, Workload


def make_workload(
    settings: Settings, *, seed: int = 0, rate: float | None = None, max_context: int | None = None
) -> Workload:
    """`seed` is added to the flags'; `rate` wins over them. Raises ConfigError."""
    config = settings.record(BenchWorkloadConfig)
    rng = np.random.default_rng(config.workload_seed + seed)
    gaps = rng.exponential(1 / (rate or config.rate), config.num_requests)
    arrivals = np.concatenate(([0.0], np.cumsum(gaps)[:-1])).tolist()
    longest = config.prompt_tokens + config.output_tokens
    if max_context is not None and longest > max_context:
        raise ConfigError(f"request 0: got {longest} tokens; allowed: {max_context}, the context")
    works = [
        Work(
            number=number,
            arrival_s=arrival_s,
            prompt_tokens=config.prompt_tokens,
            output_tokens=config.output_tokens,
            max_tokens=config.output_tokens,
            client=f"client-{number % config.num_clients}" if config.num_clients else "anonymous",
        )
        for number, arrival_s in enumerate(arrivals)
    ]
    return Workload(
        name="poisson",
        requests=lambda: iter(works),
        num_requests=len(works),
        has_clients=config.num_clients > 0,
    )


def make_feed(settings: Settings, workload: Workload) -> Feed:
    concurrency = settings.record(BenchWorkloadConfig).concurrency
    return ClosedFeed(workload, concurrency) if concurrency else Feed(workload)


class ClosedFeed(Feed):
    """`concurrency` requests are under way; the next is due when one ends."""

    def __init__(self, workload: Workload, concurrency: int):
        self._works = workload.requests()
        self._due = [0.0] * concurrency
        self._left = workload.num_requests

    def next_s(self) -> float | None:
        return self._due[0] if self._due and self._left else None

    def take(self, now_s: float) -> list[tuple[float, Work]]:
        taken = []
        while self._left and self._due and self._due[0] <= now_s:
            taken.append((self._due.pop(0), next(self._works)))
            self._left -= 1
        return taken

    def ended(self, work: Work, now_s: float) -> None:
        self._due.append(now_s)

    @property
    def finished(self) -> bool:
        return not self._left


def draw_tokens(
    work: Work, block_size: int, *, vocab_size: int, first_id: int = 3, seed: int = 0
) -> np.ndarray:
    rng = np.random.default_rng((seed, work.number))
    return rng.integers(first_id, vocab_size, work.prompt_tokens, dtype=np.int32)


def read_limits(settings: Settings) -> Limits:
    config = settings.record(BenchOutputConfig)
    seconds = (ms / 1e3 if ms else None for ms in (config.slo_ttft_ms, config.slo_tpot_ms))
    ttft_s, tpot_s = seconds
    return Limits(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=config.slo_e2e_ms / 1e3 or None)


def show_run(
    recorder: Recorder, settings: Settings, numbers: Mapping[str, float], about: Mapping[str, Any]
) -> None:
    for name, value in numbers.items():
        print(f"{name:20s} {value:10.4g}")
    write_json(settings, {"about": about, "numbers": dict(numbers)})


def write_json(settings: Settings, results: Mapping[str, Any]) -> None:
    path = settings.record(BenchOutputConfig).json
    if path:
        Path(path).write_text(json.dumps(results, indent=1))


def show_against(settings: Settings, workload: Workload, recorder: Recorder) -> None:
    raise ConfigError("against: got 'simulate'; allowed: unset: this build has no simulator")


def first_requests(workload: Workload, until_s: float) -> Workload:
    """Those that arrive before `until_s`."""
    works: Sequence[Work] = [work for work in workload.requests() if work.arrival_s < until_s]
    return replace(workload, requests=lambda: iter(works), num_requests=len(works))
