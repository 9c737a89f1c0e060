"""From settings to a simulated fleet, and its run into a recorder. Knows no flags."""

from dataclasses import dataclass, fields, replace

from jaxserve.config import EngineConfig
from jaxserve.engine.buckets import Buckets
from jaxserve.engine.build import TILE, bench_limits, serving_buckets
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.measure_dispatch import predicted_dispatch
from jaxserve.engine.scripted import Pace
from jaxserve.engine.sequence import Sequence
from jaxserve.errors import ConfigError
from jaxserve.fleet.router import Router
from jaxserve.models.config import SHAPES, ModelConfig
from jaxserve.models.profile import BYTES_OF, Profile
from jaxserve.models.sources import load_model_config, parse_source
from jaxserve.report.recorder import Recorder
from jaxserve.request import Limits
from jaxserve.schedulers.catalog import find_order, make_routing, require_told
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.serving_time import UNMEASURED_S
from jaxserve.schedulers.estimators.slice_time import NoisyTime, SliceTime
from jaxserve.schedulers.pool.catalog import POOLS
from jaxserve.schedulers.routing.catalog import Need
from jaxserve.sim.device import Device
from jaxserve.sim.fleet import FleetSimulation
from jaxserve.sim.padded_static import PaddedSlice
from jaxserve.sim.pool import PoolConfig, Tick, simulate_pool
from jaxserve.sim_config import SimConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.load import require_clients, require_prefixes
from jaxserve.workload.tokens import own_page_keys, page_keys_of
from jaxserve.workload.work import Work, Workload

_ANYTHING = 1 << 20
"""Tokens of a context that nothing is known to bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is simulated: replicas configured like `engine`, on devices like `profile`'s.

    `dispatch_s` is what they measured of a dispatch at start; None: what they would by the profile.
    """

    engine: EngineConfig
    sim: SimConfig
    profile: Profile
    dispatch_s: float | None = None

    def __post_init__(self) -> None:
        if self.engine.cache.prefix_scope == "group":
            raise ConfigError(
                "prefix_scope: got 'group'; allowed: auto, client, all: workloads have no groups"
            )
        size = self.engine.cache.page_size
        if size != self.profile.page_size:
            raise ConfigError(
                f"page_size: got {size}; allowed: {self.profile.page_size}, as in the profile of"
                f" {self.profile.model_name} on {self.profile.device}"
            )
        if not self.num_pages:
            raise ConfigError(
                f"num_pages: got none, and the profile of {self.profile.model_name} on"
                f" {self.profile.device} has none either; allowed: 2 or more, with --num_pages"
            )

    @property
    def num_pages(self) -> int:
        return self.engine.cache.num_pages or self.profile.num_pages or 0

    @property
    def max_context(self) -> int:
        """The most tokens of prompt and output that a request may have."""
        model = _known_model(self.profile.model_name)
        longest = model.max_context if model is not None else _ANYTHING
        return self.sim.max_context or longest

    def time(self) -> SliceTime:
        """How long slices take, with the noise that is asked for."""
        if not self.sim.noise:
            return self.profile.time
        spread = self.sim.noise * self.profile.spread
        return NoisyTime(self.profile.time, spread=spread, seed=self.sim.seed)


def _known_model(name: str) -> ModelConfig | None:
    if name in SHAPES:
        return SHAPES[name]
    return load_model_config(parse_source("demo")) if name == "demo" else None


def simulate(
    workload: Workload,
    feed: Feed,
    deployment: Deployment,
    recorder: Recorder,
    *,
    tick: Tick = lambda num_ended, now_s: None,
) -> None:
    """Run the feed of a workload to its end. Deterministic: the same again gives the same.

    `tick` is called now and then. Raises ConfigError, before anything runs, where a policy needs
    what the workload lacks.
    """
    if deployment.sim.pool:
        simulate_pool(feed, pool_config(workload, deployment), recorder, tick=tick)
        return
    if not deployment.sim.blind:
        check_told(workload, deployment)
    fleet = build_fleet(workload, feed, deployment, recorder)
    fleet.run(tick=lambda fleet: tick(fleet.num_ended, fleet.agenda.now()))


def check_told(workload: Workload, deployment: Deployment) -> None:
    """Raises ConfigError where a policy would be another one in disguise."""
    order = find_order(deployment.engine.scheduler.order)
    hint = "; or --blind, to run it all the same"
    try:
        if order.needs_prefix_cache:
            require_prefixes(workload, f"order={order.name}")
        if "bounded_service_gap" in order.laws:
            require_clients(workload, f"order={order.name}")
        told: dict[Need, bool] = {
            "prefixes": workload.block_size > 0,
            "clients": workload.has_clients,
            "sessions": workload.has_sessions,
        }
        names: list[Need] = [name for name, there in told.items() if there]
        require_told(deployment.sim.routing, names, by=f"workload {workload.name!r}")
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{error}{hint}") from None


def build_fleet(
    workload: Workload, feed: Feed, deployment: Deployment, recorder: Recorder
) -> FleetSimulation:
    """The simulation of a fleet of engines, not begun."""
    sim, profile, engine = deployment.sim, deployment.profile, deployment.engine
    size = profile.page_size
    router = Router(
        make_routing(sim.routing, sim.routing_options, num_replicas=sim.replicas, page_size=size),
        num_replicas=sim.replicas,
    )
    buckets = Buckets(serving_buckets(engine), tile=TILE)
    config = CoreConfig(
        limits=Limits(
            vocab_size=profile.model.vocab_size,
            max_context=deployment.max_context,
            max_samples=engine.scheduler.max_rows,
        ),
        model_key=profile.model_name,
        num_pages=deployment.num_pages,
        page_size=size,
        prefix_cache=engine.cache.prefix_cache,
        tile=TILE,
        scheduler=engine.scheduler,
        dispatch_s=deployment.dispatch_s or _measured_dispatch_s(deployment, buckets),
    )
    device = Device(
        time=deployment.time(),
        buckets=buckets,
        vocab_size=profile.model.vocab_size,
        max_context=deployment.max_context,
        host_overlaps=profile.host_overlaps,
    )
    by_client = engine.cache.prefix_scope == "client"
    scopes: dict[str, int] = {}

    def scope_of(client: str) -> int:
        return scopes.setdefault(client, len(scopes)) if by_client else 0

    def page_keys(work: Work) -> tuple[bytes, ...]:
        scope = scope_of(work.client)
        return page_keys_of(work, workload.block_size, page_size=size, scope=scope)

    def output_keys(row: Sequence, places: range) -> list[bytes]:
        number, client = row.seed, row.job.request.client
        return own_page_keys(number, places, scope=scope_of(client))

    return FleetSimulation(
        feed,
        router,
        lambda: EngineCore(config, output_keys=output_keys),
        device,
        recorder,
        page_keys=page_keys,
        config=sim,
    )


def _measured_dispatch_s(deployment: Deployment, buckets: Buckets) -> float:
    if not deployment.engine.scheduler.weighs_dispatch:
        return UNMEASURED_S
    limits = bench_limits(
        deployment.engine, max_context=deployment.max_context, num_pages=deployment.num_pages
    )
    pace = Pace(deployment.profile.time, buckets)
    return predicted_dispatch(pace, limits, vocab_size=deployment.profile.model.vocab_size)


def pool_config(workload: Workload, deployment: Deployment) -> PoolConfig:
    """The same deployment under a pool planner. Raises ConfigError where it cannot run."""
    sim, profile, scheduler = deployment.sim, deployment.profile, deployment.engine.scheduler
    model, time = profile.model, deployment.time()
    values = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return PoolConfig(
        memory=KvMemory(
            deployment.num_pages, profile.page_size, values * BYTES_OF[profile.precision]
        ),
        estimate=profile.bilinear,
        pool=sim.pool,
        pool_options=(*_known_limits(workload, sim), *sim.pool_options),
        replicas=sim.replicas,
        padded_time=PaddedSlice(time),
        slice_time=time,
        slice_len=scheduler.slice_steps,
        max_rows=scheduler.max_rows,
        buckets=Buckets(serving_buckets(deployment.engine), tile=TILE),
    )


def _known_limits(workload: Workload, sim: SimConfig) -> list[str]:
    """Options of planners that must know the longest request beforehand: the workload's longest,
    where nobody chose."""
    parameters = POOLS[sim.pool].parameters if sim.pool in POOLS else None
    known = {field.name for field in fields(parameters)} if parameters else set()
    chosen = {option.partition("=")[0] for option in sim.pool_options}
    wanted = known & {"max_input", "max_output"} - chosen
    if not wanted:
        return []
    requests = list(workload.requests())
    longest = {
        "max_input": max((work.prompt_tokens for work in requests), default=1),
        "max_output": max((work.max_tokens for work in requests), default=1),
    }
    return [f"{name}={longest[name]}" for name in sorted(wanted)]


def with_page_size(engine: EngineConfig, profile: Profile) -> EngineConfig:
    """The configuration with the profile's page size, for when nobody chose one."""
    return replace(engine, cache=replace(engine.cache, page_size=profile.page_size))
