"""`jaxserve bench`: a workload against a live server, measured at the client.

Exit codes: 0 done, 1 the server was lost on the way, 2 bad input, 130 interrupted; what was
measured until then is reported in every case. Knows neither dialects nor statistics; no JAX.
"""

import asyncio
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from rich.console import Console

from jaxserve.bench import stand_in
from jaxserve.bench.live_display import LiveDisplay
from jaxserve.bench.load_client import LoadClient
from jaxserve.bench.repeats import repeat_table, run_numbers
from jaxserve.bench.sweep import Limits, Point, find_knee, judge
from jaxserve.bench.tally import Tally
from jaxserve.bench.transport import Asking, ServerFacts, Transport, read_client_keys
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.report.recorder import Recorder
from jaxserve.server_config import BenchConfig
from jaxserve.workload.work import Workload

EXIT_LOST: Final = 1
EXIT_INTERRUPTED: Final = 130
FEW_REQUESTS: Final = 20
"""In a sweep's window: fewer say little."""


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
    """One run's outcome."""

    workload: Workload
    recorder: Recorder = field(default_factory=Recorder)
    died: bool = False


class _Bench:
    def __init__(self, settings: Settings, config: BenchConfig):
        self._settings, self._config = settings, config
        self._limits: Limits = stand_in.read_limits(settings)
        self._console = Console(file=sys.stderr, highlight=False)
        self._client: LoadClient | None = None
        self._interrupted = False
        self._num_runs = 0

    async def run(self) -> int:
        config = self._config
        # Made before the server is asked: a bad flag is said at once.
        workload = stand_in.make_workload(self._settings, max_context=config.max_context)
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
        if self._config.api == "openai-chat":
            return self._config.vocab_size or facts.vocab_size or 1 << 16  # prompts are words
        found = self._config.vocab_size or facts.vocab_size
        if found is None:
            raise ConfigError(
                f"vocab_size: {self._config.address} does not say how many tokens {facts.model}"
                " has; give --vocab_size"
            )
        return found

    # ---------------------------------------------------------------------------- runs

    async def _run_once(
        self, run: _Run, tally: Tally, *, title: str, send_s: float, grace_s: float
    ) -> None:
        draw = partial(
            stand_in.draw_tokens,
            block_size=run.workload.block_size,
            vocab_size=self._vocab_size,
            seed=self._num_runs,  # else a run would find an earlier one's prompts cached
        )
        self._num_runs += 1
        self._client = LoadClient(
            self._transport,
            stand_in.make_feed(self._settings, run.workload),
            draw,
            recorder=run.recorder,
            tally=tally,
            send_s=send_s or None,
            grace_s=grace_s,
        )
        async with LiveDisplay(self._console, tally, title):
            await self._client.run()
        run.died = self._client.died
        self._client = None
        if run.died:
            self._say("jaxserve: the server was lost; this was measured until then")

    async def _repeat(self) -> bool:
        """Returns whether the server was lost."""
        config, all_numbers = self._config, []
        for number in range(config.repeat):
            workload = stand_in.make_workload(
                self._settings, seed=number, max_context=self._max_context
            )
            run, tally = _Run(workload), Tally()
            title = f"run {number + 1}/{config.repeat} " if config.repeat > 1 else ""
            await self._run_once(
                run, tally, title=title, send_s=config.send_s, grace_s=config.grace_s
            )
            numbers = run_numbers(tally, self._limits)
            all_numbers.append(numbers)
            stand_in.show_run(run.recorder, self._settings, numbers, self._facts.described)
            print("\n".join(tally.closing_lines(self._transport.counted)))
            if run.died or self._interrupted:
                return run.died
            if config.against:
                stand_in.show_against(self._settings, workload, run.recorder)
        if config.repeat > 1:
            print("\n".join(repeat_table(all_numbers)))
        return False

    # ---------------------------------------------------------------------------- the sweep

    async def _sweep(self) -> bool:
        """Returns whether the server was lost."""
        config, died = self._config, False

        async def measure(rate: float) -> Point | None:
            nonlocal died
            workload = stand_in.make_workload(
                self._settings, rate=rate, max_context=self._max_context
            )
            tally = Tally(warm_up_s=config.sweep_warm_up_s)
            run, send_s = _Run(workload), config.sweep_warm_up_s + config.sweep_s
            await self._run_once(
                run, tally, title=f"{rate:.3g}/s ", send_s=send_s, grace_s=config.grace_s
            )
            died = run.died
            if run.died or self._interrupted:
                return None
            until_s = min(send_s, max(row.due_s for row in tally.rows.values()))
            if until_s <= tally.warm_up_s:
                self._say(
                    f"{rate:.3g} requests/s: the workload's {workload.num_requests} requests are"
                    " sent before the warm-up ends; the sweep ends here: give it more of them"
                )
                return None
            point = judge(
                tally,
                rate=rate,
                until_s=until_s,
                limits=self._limits,
                share=config.sweep_share,
            )
            self._tell(point)
            return point

        sweep = await find_knee(
            measure,
            least=config.sweep_from,
            most=config.sweep_to,
            tolerance=config.sweep_tolerance,
        )
        if sweep.points:
            print("\n".join(sweep.table()))
            print(f"tokens counted by {self._transport.counted}")
            stand_in.write_json(self._settings, {"sweep": sweep.as_json()})
        return died

    def _tell(self, point: Point) -> None:
        verdict = "keeps up" if point.keeps_up else "too much"
        line = f"{point.rate:.3g} requests/s: {verdict}"
        if point.num_requests < FEW_REQUESTS:
            line += f" (of {point.num_requests} requests alone: give it more, or a longer sweep_s)"
        self._say(line)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
