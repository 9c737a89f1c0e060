"""How far the simulator is from the engine: live runs of one replica, and their simulations.

Server and client run on a core each. Live runs of other requests give the profile: slice times and
the host's cost fitted to their event logs, and the ways through the front end.
"""

import asyncio
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from jaxserve.bench.against import like_server, simulated
from jaxserve.bench.grpc_transport import GrpcTransport
from jaxserve.bench.load_client import LoadClient
from jaxserve.bench.peers.jaxserve_peer import serving
from jaxserve.bench.tally import Tally
from jaxserve.bench.transport import Asking, ServerFacts
from jaxserve.engine.event_log import read_events, replay
from jaxserve.engine.measure_host import LiveSlice, read_live
from jaxserve.models.profile import Profile
from jaxserve.report.measure import measure
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import About, Report
from jaxserve.schedulers.estimators.fitted_time import error_on, fit_host, fit_time
from jaxserve.sim.rerun import read_recorded, rerun
from jaxserve.sim_config import SimConfig
from jaxserve.workload.config import WorkloadConfig
from jaxserve.workload.load import load_workload
from jaxserve.workload.tokens import draw_tokens
from jaxserve.workload.work import Work

OPTIONS: Final = (
    "clients=4",
    "prefixes=8",
    "prefix=uniform:64,192",
    "own=uniform:16,64",
    "output=lognormal:48,0.6,4,160",
)
"""Of shared_prefix, for a model with a context of 2048."""


@dataclass(frozen=True, slots=True)
class Live:
    """What a live run came to. `first_s`: when the first token of each request came, on the
    log's clock."""

    report: Report
    log: Path
    facts: ServerFacts
    first_s: Mapping[int, float]


@contextmanager
def server(flags: list[str], *, core: int, client_core: int) -> Iterator[str]:
    """A server on one core; whoever asks is on another. Gives its address."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        with serving(["--mesh=tp=1", *flags]) as live:
            os.sched_setaffinity(0, {client_core})
            yield live.target
    finally:
        os.sched_setaffinity(0, everywhere)


def workload_of(rate: float, *, num_requests: int, seed: int) -> WorkloadConfig:
    """What is run at a rate."""
    return WorkloadConfig(
        workload="shared_prefix",
        workload_options=OPTIONS,
        rate=rate,
        num_requests=num_requests,
        seed=seed,
    )


def run_live(
    chosen: WorkloadConfig, log: Path, *, flags: list[str], core: int, client_core: int
) -> Live:
    """A fresh server, and the workload sent to it."""
    recorder = Recorder()
    with server([*flags, f"--event_log={log}"], core=core, client_core=client_core) as target:
        facts, begun_s = asyncio.run(_drive(target, chosen, recorder))
    numbers, times, _ = recorder.delivered_columns()
    first_s: dict[int, float] = {}
    for number, at_s in zip(numbers.tolist(), times.tolist(), strict=True):
        first_s.setdefault(number, begun_s + at_s)
    return Live(_report(recorder, chosen, "live"), log, facts, first_s)


async def _drive(
    target: str, chosen: WorkloadConfig, recorder: Recorder
) -> tuple[ServerFacts, float]:
    transport = GrpcTransport(target, Asking(temperature=0.0, name_clients=True))
    try:
        facts = await transport.facts()
        workload, make_feed = load_workload(chosen, max_context=facts.max_context)
        vocab_size = facts.vocab_size or 0

        def draw(work: Work) -> np.ndarray:
            return draw_tokens(work, workload.block_size, vocab_size=vocab_size)

        client = LoadClient(transport, make_feed(), draw, recorder=recorder, tally=Tally())
        await client.run()
        return facts, client.begun_s
    finally:
        await transport.close()


def run_simulated(chosen: WorkloadConfig, live: Live, profile: Profile, sim: SimConfig) -> Report:
    """The same workload on one modelled replica that is configured as the live server was."""
    deployment = like_server(live.facts, sim, profile)
    workload, make_feed = load_workload(chosen, max_context=live.facts.max_context)
    return _report(simulated(deployment, workload, make_feed), chosen, "simulated")


def _report(recorder: Recorder, chosen: WorkloadConfig, kind: str) -> Report:
    about = About(kind=kind, title=kind, seeds={"workload": chosen.seed})
    return measure(recorder, about)


# What is learnt from a live run.


def calibrated(profile: Profile, logs: Sequence[Path], of: Sequence[Path]) -> Profile:
    """The profile with slice times and host cost of live runs, which hold what the host took of the
    device's core: terms fitted to the slices of all `logs`, for one run meets some programs hardly
    ever; how fast the machine was, the host, and how slices scatter around their predictions, as in
    the runs `of`, for its speed drifts."""
    time = fit_time([(each.shape, each.slice_s) for log in logs for each in _usual(log)])
    now = [each for log in of for each in _usual(log)]
    # All seconds, not the median slice's: what waits for a slow one has to wait.
    speed = sum(each.slice_s for each in now) / sum(time.slice_s(each.shape) for each in now)
    time = replace(time.scaled(speed), host=fit_host([(each.handled, each.host_s) for each in now]))
    spread = error_on(time, [(each.shape, each.slice_s) for each in now])
    errors = replace(profile.errors, spread=spread)
    return replace(profile, time=time, errors=errors, host_overlaps=True)


def _usual(log: Path) -> list[LiveSlice]:
    """Slices but those of ten times the median: the server waited for something."""
    slices = read_live(log)
    typical_s = statistics.median(each.gap_s for each in slices)
    return [each for each in slices if each.gap_s < 10 * typical_s]


def front_end(live: Live) -> tuple[float, float]:
    """The ways through the front end, mean seconds: of a request to an engine that was idle, and of
    a first token from the engine to the client, beyond the host's own work on its slice."""
    ways, back = [], []
    flying: dict[int, list[int]] = {}
    idle = False  # until the host found nothing to do
    for event in read_events(live.log):
        now_s = event["now_s"]
        if event["event"] == "submit":
            if idle:
                ways.append(now_s - event["request"]["arrived_s"])
            idle = False
        elif event["event"] == "slice" and event["plan"] is not None:
            idle, rows = False, event["plan"]["rows"]
            flying[event["plan"]["number"]] = [r["start"]["seed"] for r in rows if "start" in r]
        elif event["event"] == "slice":
            idle = not flying
        elif event["event"] == "complete":
            result = event["result"]
            for seed in flying.pop(result["number"]):
                if seed in live.first_s:
                    back.append(live.first_s[seed] - now_s - result["host_s"])
    return statistics.fmean(ways), max(0.0, statistics.fmean(back))


def plans_equal(log: Path) -> tuple[int, int]:
    """Of a live run's plans, those that the simulator makes from arrivals and slice times alone,
    and all."""
    recorded = read_recorded(log)
    return sum(ours == theirs for ours, theirs in rerun(recorded)), len(recorded.plans)


def replayed(log: Path) -> tuple[int, int]:
    """Of a live run's plans, those that a core makes of the same calls, and all."""
    pairs = [(ours, theirs) for ours, theirs in replay(read_events(log)) if ours is not None]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)
