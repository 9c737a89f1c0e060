"""What a slice costs its host beside the device's time: from the core alone, or from a live log.

The core alone plans, parses and reports for a scripted device; a live server also has sockets, a
front end and clients, and on a machine with few cores they take time from everything.
"""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.build import core_config
from jaxserve.engine.core import EngineCore
from jaxserve.engine.event_log import plan_from_json, read_events
from jaxserve.engine.plan import SlicePlan
from jaxserve.engine.scripted import Pace, ScriptedExecutor
from jaxserve.engine.slice_shape import slice_shape
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.request import Request, SamplingParams
from jaxserve.schedulers.estimators.fitted_time import Measured
from jaxserve.schedulers.estimators.serving_time import SliceShape


@dataclass(frozen=True, slots=True)
class LiveSlice:
    """What the device ran, and its seconds; the seconds since the last slice's end; what the host
    handled, padding left out, and its processor's seconds."""

    shape: SliceShape
    slice_s: float
    gap_s: float
    handled: SliceShape
    host_s: float


def measure_core(
    config: EngineConfig,
    model: ModelConfig,
    *,
    num_pages: int,
    pace: Pace,
    num_requests: int = 200,
) -> list[Measured]:
    """Seconds of the core's work around each slice of a made-up run: planning, parsing, reporting.

    Packing is not among them: it is part of the slice's own time.
    """
    core = EngineCore(core_config(config, model, num_pages))
    executor = ScriptedExecutor(
        vocab_size=model.vocab_size, pace=pace, now=lambda: 0.0, sleep=lambda _: None
    )
    most = min(model.max_context, num_pages * config.cache.page_size) // 4
    requests = _requests(model, num_requests, most_tokens=max(2, most))
    points: list[Measured] = []
    flights: deque[tuple[SlicePlan, Any]] = deque()
    now_s, host_s = 0.0, 0.0
    while requests or not core.idle:
        while requests and len(core.jobs) < config.scheduler.max_rows:
            core.submit(requests.pop(), now_s)
        began_s = time.thread_time()
        plan = core.next_slice(now_s)
        host_s += time.thread_time() - began_s
        if plan is not None:
            flights.append((plan, executor.dispatch(plan)))
            continue
        plan, ticket = flights.popleft()
        result = executor.wait(ticket)
        now_s += result.slice_s
        began_s = time.thread_time()
        core.complete(result, now_s)
        core.take_deltas()
        host_s += time.thread_time() - began_s
        points.append((_handled(plan), host_s))
        host_s = 0.0
    return points


def _handled(plan: SlicePlan) -> SliceShape:
    return SliceShape(plan.steps, len(plan.rows), 0, plan.num_prefill_tokens)


def _requests(model: ModelConfig, count: int, *, most_tokens: int) -> list[Request]:
    """Prompts and outputs of all lengths below `most_tokens`."""
    rng, requests = np.random.default_rng(0), []
    for number in range(count):
        prompt = rng.integers(0, model.vocab_size, int(rng.integers(1, most_tokens))).astype(
            np.int32
        )
        params = SamplingParams(
            max_tokens=int(rng.integers(1, most_tokens)), ignore_eos=True, seed=0
        )
        requests.append(Request(request_id=str(number), prompt=prompt, params=params))
    return requests


def read_live(path: str | Path, *, alone: bool = False) -> list[LiveSlice]:
    """The slices of an event log that followed another one without a pause; `alone`: but for those
    dispatched while another one ran, which hid some of the host's work, or waited for it.

    Raises ConfigError for a file that is missing or no event log, and for one of no such slices.
    """
    try:
        slices = _read_live(path, alone)
    except OSError as error:
        raise ConfigError(f"live_log: {str(path)!r}: {error.strerror}") from error
    if not slices:
        raise ConfigError(f"live_log: got {str(path)!r}, without slices; allowed: a busy server's")
    return slices


def _read_live(path: str | Path, alone: bool) -> list[LiveSlice]:
    flights: deque[tuple[SlicePlan, bool]] = deque()  # and whether it is wanted
    lengths: dict[int, int] = {}
    slices: list[LiveSlice] = []
    last_s: float | None = None
    for event in read_events(path):
        if event["event"] == "slice" and event["plan"] is not None:
            flights.append((plan_from_json(event["plan"]), not (alone and flights)))
        elif event["event"] == "slice" and not flights:
            last_s = None  # nothing to do: the next slice waited for a request, not for the host
        elif event["event"] == "complete":
            result, (plan, wanted) = event["result"], flights.popleft()
            shape = _shape(plan, result, lengths)
            if wanted and last_s is not None:
                gap_s = event["now_s"] - last_s
                slices.append(
                    LiveSlice(shape, result["slice_s"], gap_s, _handled(plan), result["host_s"])
                )
            last_s = event["now_s"]
    return slices


def _shape(plan: SlicePlan, result: dict[str, Any], lengths: dict[int, int]) -> SliceShape:
    """What a logged slice ran as; `lengths`, by slot, are brought to its end."""
    for row in plan.rows:
        if row.start is not None:
            lengths[row.slot] = row.start.prompt.size + len(row.start.made)
    counts = [len(made) for made in result["tokens"]]
    shape = slice_shape(
        plan,
        lengths=[lengths.get(row.slot, 0) for row in plan.rows],
        counts=counts,
        steps_run=result["steps_run"],
        rows_run=result["rows_run"],
        prefill_run=result["prefill_run"],
    )
    for row, count in zip(plan.rows, counts, strict=True):
        lengths[row.slot] = lengths.get(row.slot, 0) + count
    return shape
