"""How fast the simulator is: requests per second of its own time, at a share of capacity.

Capacity is found by simulating: what a fleet ends per second of virtual time when everything has
arrived at once.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.profile import find_profile
from jaxserve.report.recorder import Recorder
from jaxserve.sim.fleet import FleetSimulation
from jaxserve.sim.run import Deployment, build_fleet
from jaxserve.sim_config import SimConfig
from jaxserve.workload.config import WorkloadConfig
from jaxserve.workload.load import load_workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A fleet under load. `num_pages` None: as the profile has it."""

    profile: str
    replicas: int
    num_requests: int
    order: str = "dlpm"
    routing: str = "d2lpm"
    slicing: str = "adaptive"
    max_rows: int = 64
    max_prefill_tokens: int = 512
    num_pages: int | None = None
    load: float = 0.9

    def deployment(self) -> Deployment:
        profile = find_profile(self.profile)
        engine = EngineConfig(
            cache=CacheConfig(page_size=profile.page_size, num_pages=self.num_pages),
            scheduler=SchedulerConfig(
                order=self.order,
                slicing=self.slicing,
                max_rows=self.max_rows,
                max_prefill_tokens=self.max_prefill_tokens,
                max_waiting=10**7,
                max_waiting_tokens=10**12,
                queue_timeout_s=0.0,
            ),
        )
        sim = SimConfig(profile=self.profile, replicas=self.replicas, routing=self.routing)
        return Deployment(engine=engine, sim=sim, profile=profile)


@dataclass(frozen=True, slots=True)
class Speed:
    """What a run came to; `seconds` are of this process's processor time, and real ones."""

    scenario: Scenario
    rate: float
    num_requests: int
    cpu_s: float
    real_s: float
    virtual_s: float
    num_slices: int
    steps_per_slice: float
    rows_per_slice: float
    peak_gib: float

    @property
    def requests_per_s(self) -> float:
        return self.num_requests / self.real_s


def capacity(scenario: Scenario, *, num_requests: int) -> float:
    """Requests per second of virtual time of the fleet when nobody waits for arrivals."""
    simulation = _build(replace(scenario, num_requests=num_requests), rate=1e6)
    simulation.run()
    return num_requests / simulation.agenda.now()


def measure(
    scenario: Scenario,
    *,
    rate: float,
    tick: Callable[[FleetSimulation], None] = lambda simulation: None,
) -> Speed:
    """Simulate the scenario at `rate` requests per second."""
    simulation = _build(scenario, rate=rate)
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    simulation.run(tick=tick)
    cpu_s, real_s = time.process_time() - cpu_began_s, time.perf_counter() - began_s
    now = [core.statistics_now for core in simulation.cores()]
    slices, steps = sum(each.slices for each in now), sum(each.steps for each in now)
    return Speed(
        scenario=scenario,
        rate=rate,
        num_requests=simulation.num_ended,
        cpu_s=cpu_s,
        real_s=real_s,
        virtual_s=simulation.agenda.now(),
        num_slices=slices,
        steps_per_slice=steps / slices,
        rows_per_slice=sum(each.row_steps for each in now) / steps,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


def _build(scenario: Scenario, *, rate: float) -> FleetSimulation:
    chosen = WorkloadConfig(num_requests=scenario.num_requests, rate=rate)
    deployment = scenario.deployment()
    workload, make_feed = load_workload(chosen, max_context=deployment.max_context)
    recorder = Recorder(keep_rows=False, keep_slices=0)
    return build_fleet(workload, make_feed(), deployment, recorder)
