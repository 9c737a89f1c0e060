"""`jaxserve simulate`: a workload through any preset on any number of modelled replicas.

The report goes to stdout, progress to stderr. Exit codes: 0 done, 2 something the user can mend,
130 interrupted.
"""

import platform
import sys
import time
from typing import Final

from rich.console import Console

from jaxserve import __version__
from jaxserve.config import EngineConfig, PresetConfig
from jaxserve.engine.garbage import settle_collector
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.models.profile import Profile, find_profile
from jaxserve.report.config import OutputConfig
from jaxserve.report.measure import measure
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import About
from jaxserve.report.write import check_files, write_report
from jaxserve.server.progress import ProgressDisplay
from jaxserve.sim.run import Deployment, simulate, with_page_size
from jaxserve.sim_config import SimConfig
from jaxserve.workload.config import WorkloadConfig
from jaxserve.workload.load import load_workload
from jaxserve.workload.work import Workload

EXIT_INTERRUPTED: Final = 130
TELL_EVERY_S: Final = 0.2
TELL_LINES_EVERY_S: Final = 5.0
_OF_POOLS: Final = ("slice_steps", "max_rows", "max_prefill_tokens", "page_size", "num_pages")
"""The engine's settings that mean something under a pool planner."""
_POLICIES: Final = ("preset", "order", "admission", "slicing", "victim", "routing", "pool")


def main(settings: Settings) -> int:
    """Simulate and report; returns the exit code. Raises ConfigError for what the user can mend."""
    sim, output = settings.record(SimConfig), settings.record(OutputConfig)
    engine, profile = settings.record(EngineConfig), find_profile(sim.profile)
    check_files(output)
    if "page_size" not in settings.given(EngineConfig):
        engine = with_page_size(engine, profile)
    _check_pool(settings, sim)
    deployment = Deployment(engine=engine, sim=sim, profile=profile)
    chosen = settings.record(WorkloadConfig)
    workload, make_feed = load_workload(chosen, max_context=deployment.max_context)
    print(f"{settings.describe()}\n", flush=True)
    recorder = Recorder(keep_rows=output.json_rows or bool(output.csv))
    progress = _Progress(workload)
    settle_collector()
    try:
        simulate(workload, make_feed(), deployment, recorder, tick=progress.tick)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        progress.close()
    about = About(
        kind="simulated",
        title=_title(settings, workload),
        configuration=settings.as_text(),
        workload={"name": workload.name, **workload.described},
        profile=describe_profile(profile),
        versions={"jaxserve": __version__, "python": platform.python_version()},
        seeds={"workload": chosen.seed, "simulation": sim.seed},
    )
    write_report(measure(recorder, about, output.measure_options), output, _tell)
    return 0


def describe_profile(profile: Profile) -> dict[str, str]:
    """What a reader must know of the times that a simulation ran by."""
    return {
        "model": profile.model_name,
        "device": f"{profile.num_devices} x {profile.device}",
        "precision": profile.precision,
        "kind": profile.kind,
        "date": profile.date,
        "key": profile.key,
    }


def _check_pool(settings: Settings, sim: SimConfig) -> None:
    """Raises ConfigError for settings that would be ignored."""
    if not sim.pool:
        if sim.pool_options:
            raise ConfigError("pool_options: got some without --pool; allowed: with --pool")
        return
    given = [name for name in settings.given(EngineConfig) if name not in _OF_POOLS]
    given += [
        name
        for name in settings.given(SimConfig)
        if name not in ("profile", "noise", "max_context", "replicas", "pool", "pool_options")
        and name != "seed"
    ]
    if given:
        raise ConfigError(
            f"{given[0]}: got a value with --pool={sim.pool}, which plans all by itself; allowed"
            f" beside it: {', '.join(_OF_POOLS)}; or unset --pool"
        )


def _title(settings: Settings, workload: Workload) -> str:
    """The workload, the policies that somebody chose, the fleet."""
    sim, values = settings.record(SimConfig), settings.as_text()
    given = {*settings.given(PresetConfig), *settings.given(EngineConfig)}
    given.update(settings.given(SimConfig))
    chosen = " ".join(values[name] for name in _POLICIES if name in given) or "default"
    replicas = "1 replica" if sim.replicas == 1 else f"{sim.replicas} replicas"
    return f"{workload.name}: {chosen}, {replicas} of {sim.profile}"


class _Progress:
    """Says how far the simulation is, a few times a second on a terminal, else now and then."""

    def __init__(self, workload: Workload):
        console = Console(stderr=True)
        self._display = ProgressDisplay(console)
        self._every_s = TELL_EVERY_S if console.is_terminal else TELL_LINES_EVERY_S
        self._total = workload.num_requests
        self._began_s = self._next_s = time.monotonic()
        self._next_s += self._every_s

    def tick(self, num_ended: int, virtual_s: float) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._every_s
        passed_s = now_s - self._began_s
        self._display.show(
            f"simulated {num_ended}/{self._total} requests, {virtual_s:,.0f} s of virtual time,"
            f" {num_ended / passed_s:,.0f} requests/s"
        )

    def close(self) -> None:
        self._display.close()


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
