"""The same workload through the simulator, set up as the live server says that it is."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from jaxserve import flag_table as table
from jaxserve import flags
from jaxserve.bench.transport import ServerFacts
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.profile import Profile
from jaxserve.report.recorder import Recorder
from jaxserve.sim.run import Deployment, simulate
from jaxserve.sim_config import SimConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Workload

_GROUPS = (table.SIMULATED_MEMORY, table.FLEET_SCHEDULING)


def like_server(facts: ServerFacts, sim: SimConfig, profile: Profile) -> Deployment:
    """One replica configured as the server is. Raises ConfigError where it does not say how, and
    for a profile of another model, page size or number of devices."""
    if not facts.configuration or facts.num_pages is None:
        raise ConfigError(
            "against: got 'simulate', and the server does not say how it is configured; allowed:"
            " with --api=grpc, and a server of ours"
        )
    if facts.model != profile.model_name:
        raise ConfigError(
            f"profile: got one of {profile.model_name}; allowed: one of {facts.model}, which the"
            " server has"
        )
    if facts.num_devices not in (None, profile.num_devices):
        raise ConfigError(
            f"profile: got one of {profile.num_devices} devices; allowed: one of"
            f" {facts.num_devices}, which the server runs on (--mesh)"
        )
    engine = _engine_of(facts.configuration)
    cache = replace(engine.cache, num_pages=facts.num_pages)
    sim = replace(sim, max_context=facts.max_context or 0)
    return Deployment(
        engine=replace(engine, cache=cache), sim=sim, profile=profile, dispatch_s=facts.dispatch_s
    )


def _engine_of(configuration: Mapping[str, str]) -> EngineConfig:
    """From the effective flags of a server, as texts."""
    arguments = []
    for flag in (flag for group in _GROUPS for flag in group.flags):
        text = configuration.get(flag.name, "unset")
        if flag.name == "preset" or text in ("unset", ""):
            continue  # what a preset filled in is said flag by flag
        several = flag.kind == tuple[str, ...]
        arguments += [f"--{flag.name}={each}" for each in (text.split(",") if several else [text])]
    return flags.parse(_GROUPS, arguments, environment={}, known=()).record(EngineConfig)


def simulated(
    deployment: Deployment, workload: Workload, make_feed: Callable[[], Feed]
) -> Recorder:
    """What the simulator says of the workload."""
    recorder = Recorder()
    simulate(workload, make_feed(), deployment, recorder)
    return recorder
