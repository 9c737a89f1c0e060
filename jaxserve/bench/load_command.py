"""`jaxserve bench`: a workload against a live server, measured at the client.

Exit codes: 0 done, 1 the server was lost on the way, 2 bad input, 130 interrupted; what was
measured until then is reported in every case. Knows neither dialects nor statistics; no JAX.
"""

import asyncio
import json
import math
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console

from jaxserve import __version__
from jaxserve.bench.against import like_server, simulated
from jaxserve.bench.live_display import LiveDisplay
from jaxserve.bench.load_client import LoadClient
from jaxserve.bench.repeats import repeat_table, run_numbers
from jaxserve.bench.sweep import Point, find_knee, judge
from jaxserve.bench.tally import Tally
from jaxserve.bench.transport import Asking, ServerFacts, Transport, read_client_keys
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.models.profile import find_profile
from jaxserve.report.config import OutputConfig
from jaxserve.report.errors import side_by_side
from jaxserve.report.measure import measure
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import About, Report
from jaxserve.report.write import check_files, write_report, write_text
from jaxserve.server_config import BenchConfig
from jaxserve.sim.command import describe_profile
from jaxserve.sim_config import SimConfig
from jaxserve.workload.config import WorkloadConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.load import load_workload
from jaxserve.workload.tokens import draw_tokens
from jaxserve.workload.work import Work, Workload

EXIT_LOST: Final = 1
EXIT_INTERRUPTED: Final = 130
FEW_REQUESTS: Final = 20
"""In a sweep's window: fewer say little."""
_SECRETS: Final = ("api_key",)
"""Flags that no report shows."""


def main(settings: Settings) -> int:
    """Returns the exit code. Raises ConfigError for what the user can mend."""
    config = settings.record(BenchConfig)
    return asyncio.run(_Bench(settings, config).run())


def open_transport(config: BenchConfig, asking: Asking) -> Transport:
    """The dialect that `config` names. Raises ConfigError for an address that is none."""
    if config.api == "grpc":
        from jaxserve.bench.grpc_transport import GrpcTransport

        return GrpcTransport(config.address, asking, connections=config.connections)
    from jaxserve.bench.http_transport import HttpTransport

    return HttpTransport(config.address, asking, chat=config.api == "openai-chat")


@dataclass(slots=True)
class _Run:
    """One run: what it is given, and what came of it."""

    workload: Workload
    make_feed: Callable[[], Feed]
    tally: Tally = field(default_factory=Tally)
    recorder: Recorder = field(default_factory=Recorder)
    died: bool = False


class _Bench:
    def __init__(self, settings: Settings, config: BenchConfig):
        self._settings, self._config = settings, config
        self._workload_config = settings.record(WorkloadConfig)
        self._output = settings.record(OutputConfig)
        if config.sweep and self._workload_config.loop == "closed":
            raise ConfigError("sweep: got true; allowed: false with --loop=closed: it has no rate")
        check_files(self._output)
        self._console = Console(file=sys.stderr, highlight=False)
        self._client: LoadClient | None = None
        self._interrupted = False
        self._num_runs = 0

    async def run(self) -> int:
        config = self._config
        # Read before the server is asked: what is wrong with it is said at once.
        workload, _ = load_workload(self._workload_config, max_context=config.max_context)
        asking = Asking(
            model=config.served_model,
            temperature=config.temperature,
            ignore_eos=config.ignore_eos,
            name_clients=workload.has_clients,
            api_key=config.api_key,
            keys=read_client_keys(config.client_keys),
        )
        self._transport = open_transport(config, asking)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            self._facts = await self._transport.facts()
            self._vocab_size = self._known_vocab_size(self._facts)
            self._max_context = config.max_context or self._facts.max_context
            self._say(f"{config.api} at {config.address}: {self._facts.model}")
            if config.against:
                sim = self._settings.record(SimConfig)
                self._like_server = like_server(self._facts, sim, find_profile(sim.profile))
            died = await (self._sweep() if config.sweep else self._repeat())
        finally:
            await self._transport.close()
        if self._interrupted:
            return EXIT_INTERRUPTED
        return EXIT_LOST if died else 0

    def _interrupt(self) -> None:
        self._interrupted = True
        if self._client is not None:
            self._client.stop()

    def _known_vocab_size(self, facts: ServerFacts) -> int:
        found = self._config.vocab_size or facts.vocab_size
        if found is None and self._config.api == "openai-chat":
            return 1 << 16  # prompts are words
        if found is None:
            raise ConfigError(
                f"vocab_size: {self._config.address} does not say how many tokens {facts.model}"
                " has; give --vocab_size"
            )
        return found

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    # ---------------------------------------------------------------------------- runs

    async def _run_once(self, run: _Run, *, title: str, send_s: float) -> None:
        workload, seed = run.workload, self._num_runs
        self._num_runs += 1

        def draw(work: Work) -> np.ndarray:
            # Seeded by run, else one would find an earlier one's prompts in the server's cache.
            return draw_tokens(work, workload.block_size, vocab_size=self._vocab_size, seed=seed)

        self._client = LoadClient(
            self._transport,
            run.make_feed(),
            draw,
            recorder=run.recorder,
            tally=run.tally,
            send_s=send_s or None,
            grace_s=self._config.grace_s,
        )
        async with LiveDisplay(self._console, run.tally, title):
            await self._client.run()
        run.died = self._client.died
        self._client = None
        if run.died:
            self._say("jaxserve: the server was lost; this was measured until then")

    async def _repeat(self) -> bool:
        """Returns whether the server was lost."""
        config, numbers = self._config, []
        for number in range(config.repeat):
            workload_config = replace(
                self._workload_config, seed=self._workload_config.seed + number
            )
            run = _Run(*load_workload(workload_config, max_context=self._max_context))
            title = f"run {number + 1}/{config.repeat} " if config.repeat > 1 else ""
            await self._run_once(run, title=title, send_s=config.send_s)
            report = self._report(run)
            numbers.append(run_numbers(report))
            if config.against and not (run.died or self._interrupted):
                report = self._beside_simulation(run, report)
            write_report(report, _numbered(self._output, number), self._say)
            print("\n".join(run.tally.closing_lines(self._transport.counted)), flush=True)
            if run.died or self._interrupted:
                return run.died
        if config.repeat > 1:
            print("\n".join(repeat_table(numbers)))
        return False

    def _report(self, run: _Run) -> Report:
        return measure(run.recorder, self._about(run, kind="live"), self._output.measure_options)

    def _about(self, run: _Run, *, kind: str) -> About:
        shown = {f"--{k}": v for k, v in self._settings.as_text().items() if k not in _SECRETS}
        late_ms = 1e3 * run.tally.lateness_p99_s()
        return About(
            kind=kind,
            title=f"{run.workload.name}, {self._config.api} at {self._config.address}",
            configuration={
                **{f"server {name}": value for name, value in self._facts.described.items()},
                **{f"server --{name}": value for name, value in self._facts.configuration.items()},
                **{f"client {name}": value for name, value in shown.items()},
                "client lateness": f"P99 {late_ms:.1f} ms",
                "tokens counted by": self._transport.counted,
            },
            workload={"name": run.workload.name, **run.workload.described},
            versions={"jaxserve": __version__, "Python": platform.python_version()},
            seeds={"workload": self._workload_config.seed},
        )

    def _beside_simulation(self, run: _Run, live: Report) -> Report:
        """The live run's report, with what the simulator says of it and how far that is off."""
        deployment = self._like_server
        self._say("simulating the same workload")
        recorder = simulated(deployment, run.workload, run.make_feed)
        about = replace(
            self._about(run, kind="simulated"), profile=describe_profile(deployment.profile)
        )
        return side_by_side(live, measure(recorder, about, self._output.measure_options))

    # ---------------------------------------------------------------------------- the sweep

    async def _sweep(self) -> bool:
        """Returns whether the server was lost."""
        config, died = self._config, False

        async def at_rate(rate: float) -> Point | None:
            nonlocal died
            run = self._run_at(rate)
            send_s = config.sweep_warm_up_s + config.sweep_s
            await self._run_once(run, title=f"{rate:.3g}/s ", send_s=send_s)
            died = run.died
            if run.died or self._interrupted:
                return None
            until_s = min(send_s, max(row.due_s for row in run.tally.rows.values()))
            if until_s <= config.sweep_warm_up_s:
                self._say(
                    f"{rate:.3g} requests/s: all {run.workload.num_requests} requests are sent"
                    " before the warm-up ends; the sweep ends here: give it a longer workload"
                )
                return None
            limits, share = self._output.limits, config.sweep_share
            point = judge(run.tally, rate=rate, until_s=until_s, limits=limits, share=share)
            self._tell(point)
            return point

        sweep = await find_knee(
            at_rate,
            least=config.sweep_from,
            most=config.sweep_to,
            tolerance=config.sweep_tolerance,
        )
        if sweep.points:
            print("\n".join(sweep.table()))
            print(f"tokens counted by {self._transport.counted}")
        if self._output.json:
            text = json.dumps({"sweep": sweep.as_json()}, indent=1)
            write_text(self._output.json, text, field="json", progress=self._say)
        return died

    def _run_at(self, rate: float) -> _Run:
        """A run of the workload at `rate`; a generated one is as long as the rate needs."""
        config, changed = self._config, {"rate": rate, "time_scale": None}
        if not self._workload_config.trace and self._workload_config.num_requests is None:
            seconds = config.sweep_warm_up_s + config.sweep_s
            changed["num_requests"] = math.ceil(rate * seconds * 1.2) + 10
        workload_config = replace(self._workload_config, **changed)
        tally = Tally(warm_up_s=config.sweep_warm_up_s)
        return _Run(*load_workload(workload_config, max_context=self._max_context), tally=tally)

    def _tell(self, point: Point) -> None:
        verdict = "keeps up" if point.keeps_up else "too much"
        line = f"{point.rate:.3g} requests/s: {verdict}"
        if point.num_requests < FEW_REQUESTS:
            line += f" (of {point.num_requests} requests alone: give it more, or a longer sweep_s)"
        self._say(line)


def _numbered(output: OutputConfig, number: int) -> OutputConfig:
    """Files of a run that is not the first have its number in their names."""
    if not number:
        return output
    named = {}
    for form, path in output.files.items():
        if path:
            place = Path(path)
            named[form] = str(place.with_name(f"{place.stem}-{number + 1}{place.suffix}"))
    return replace(output, **named)
