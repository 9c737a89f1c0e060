"""What serving costs over the device's own work: a live run against a replay of its plans.

The server runs on one core, its client on another. Every plan is recorded; then the same plans run
on the same core straight from the log, without front end, engine core, sockets or client. Useful
tokens per second of the first over the second is the share that is left after the host's cost.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.bench.peers.jaxserve_peer import MODEL, run_once, serving
from jaxserve.bench.peers.protocol import Meter
from jaxserve.bench.peers.workload import MAX_ROWS, make_requests, warm_up_requests
from jaxserve.client import AsyncClient
from jaxserve.engine.batch import BatchShape
from jaxserve.engine.buckets import make_buckets
from jaxserve.engine.build import TILE
from jaxserve.engine.devices import open_mesh
from jaxserve.engine.event_log import plan_from_json, read_events
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.plan import SlicePlan
from jaxserve.models.config import SHAPES
from jaxserve.models.sources import load_weights, parse_source


@dataclass(frozen=True, slots=True)
class HostCost:
    """Tokens per second live and replayed, at a fixed slice length."""

    steps: int
    useful_tokens: int
    live_tokens_per_s: float
    replayed_tokens_per_s: float

    @property
    def share(self) -> float:
        """Live over replayed: 1 would be a host that costs nothing."""
        return self.live_tokens_per_s / self.replayed_tokens_per_s


def measure(
    steps: int, *, num_requests: int, server_core: int, client_core: int, log: Path
) -> HostCost:
    """One live run with slices of `steps` steps, and its replay."""
    all_cores = os.sched_getaffinity(0)
    flags = ["--slicing=fixed", f"--slice_steps={steps}", f"--event_log={log}"]
    os.sched_setaffinity(0, {server_core})  # what is started now stays there
    with serving(flags) as server:
        os.sched_setaffinity(0, {client_core})
        meter = asyncio.run(_drive(server.target, num_requests))
    result = meter.result("live", "greedy", config={})
    os.sched_setaffinity(0, {server_core})
    try:
        seconds = replay_s(log, steps=steps)
    finally:
        os.sched_setaffinity(0, all_cores)
    return HostCost(
        steps=steps,
        useful_tokens=result.useful_tokens,
        live_tokens_per_s=result.tokens_per_s,
        replayed_tokens_per_s=result.useful_tokens / seconds,
    )


async def _drive(target: str, num_requests: int) -> Meter:
    requests = make_requests(SHAPES[MODEL].vocab_size, count=num_requests, seed=0)
    async with AsyncClient(target) as client:
        await run_once(client, warm_up_requests(requests), "greedy", Meter())
        meter = Meter()
        await run_once(client, requests, "greedy", meter)
        return meter


def replay_s(log: Path, *, steps: int) -> float:
    """Seconds that the plans of the measured run take, dispatched as deep as they were."""
    events = [event for event in read_events(log) if event["event"] != "limit"]
    core = events[0]["config"]
    submits = [i for i, event in enumerate(events) if event["event"] == "submit"]
    num_warm_up = len(warm_up_requests(make_requests(SHAPES[MODEL].vocab_size)))
    first = submits[num_warm_up]
    config, page_size = SHAPES[MODEL], core["page_size"]
    mesh = open_mesh("auto", config)  # as the server did on the same core
    source = parse_source(f"random:{MODEL}")
    executor = JaxExecutor(
        config,
        load_weights(source, config, dtype="float32", seed=0, mesh=mesh),
        mesh=mesh,
        shape=BatchShape(
            tile=TILE,
            table_pages=-(-config.max_context // page_size),
            step_buffer=steps,
            max_rows=MAX_ROWS,
        ),
        buckets=make_buckets(MAX_ROWS, core["scheduler"]["max_prefill_tokens"] // TILE),
        num_pages=core["num_pages"],
        page_size=page_size,
        kernels="auto",
        dtype="float32",
    )
    executor.compile_all(lambda _: None, threads=2)
    _run(executor, events[:first])
    prepared = _prepare(events[first:])
    began_s = time.perf_counter()
    _run_prepared(executor, prepared)
    return time.perf_counter() - began_s


def _prepare(events: Sequence[dict]) -> list[SlicePlan | None]:
    """Plans in order of dispatch; None where the oldest slice in flight was waited for."""
    moves: list[SlicePlan | None] = []
    for event in events:
        if event["event"] == "slice" and event["plan"] is not None:
            moves.append(plan_from_json(event["plan"]))
        elif event["event"] == "complete":
            moves.append(None)
    return moves


def _run(executor: JaxExecutor, events: Sequence[dict]) -> None:
    _run_prepared(executor, _prepare(events))


def _run_prepared(executor: JaxExecutor, moves: Sequence[SlicePlan | None]) -> None:
    flights: deque = deque()
    for plan in moves:
        if plan is not None:
            flights.append(executor.dispatch(plan))
        elif flights:
            executor.wait(flights.popleft())
    while flights:
        executor.wait(flights.popleft())
