"""Keeps one engine process alive: starts it, follows it, starts it again. Knows no request.

An engine must never outlive its parent, however that one ends. The lifeline is the engine's stdin:
the write end lives in this process alone, so the kernel closes it when this process is gone, and an
engine that reads end-of-file exits. PR_SET_PDEATHSIG was the other way; it is Linux only, and it
fires when the *thread* that started the process ends.

Engines that fail quickly, one after the other, are started again after longer and longer waits,
and after `RestartPolicy.most_quick_failures` of them no more. An engine that says what the user can
mend before the first was ever ready is not started again; later the same words are a failure like
others, since a device may need a moment to get back what its last owner held.
"""

import asyncio
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.server.engine_launch import (
    EXIT_CONFIG,
    EngineLaunch,
    Failure,
    Progress,
    Ready,
    status_from_line,
)

ENGINE_COMMAND: Final = (sys.executable, "-m", "jaxserve.server.engine_process")
STOP_GRACE_S: Final = 5.0

logger = logging.getLogger(__name__)


class EngineLost(Exception):
    """The engine failed too often, too quickly; the server cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """A failure is quick when the engine was ready for less than `quick_s`, or never."""

    quick_s: float = 30.0
    most_quick_failures: int = 3
    first_wait_s: float = 0.2
    most_wait_s: float = 10.0

    def wait_s(self, quick_failures: int) -> float:
        """How long to wait after so many quick failures in a row; the first restart is at once."""
        if quick_failures == 0:
            return 0.0
        return min(self.first_wait_s * 2 ** (quick_failures - 1), self.most_wait_s)


@dataclass(frozen=True, slots=True)
class SupervisorStatistics:
    pid: int | None
    ready: bool
    restarts: int


@dataclass(frozen=True, slots=True)
class _Ended:
    """How one engine process ended. `ready_s` is how long it served; None: it never did."""

    exit_code: int
    failure: str
    ready_s: float | None

    def describe(self) -> str:
        how = (
            f"was killed by signal {-self.exit_code}"
            if self.exit_code < 0
            else (f"exited with code {self.exit_code}")
        )
        when = "before it was ready" if self.ready_s is None else f"after {self.ready_s:.1f} s"
        return f"the engine process {how} {when}" + (f": {self.failure}" if self.failure else "")


class EngineSupervisor:
    """One engine and its successors. All methods belong to one event loop.

    `on_ready` and `on_progress` are called on the loop. `command` starts an engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        socket_path: str,
        log_level: str = "info",
        on_progress: Callable[[str], None] = lambda text: None,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        policy: RestartPolicy | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ):
        self._config = config
        self._socket_path = socket_path
        self._log_level = log_level
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._policy = policy or RestartPolicy()
        self._command = tuple(command)
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._ready_at_s: float | None = None
        self._ever_ready = False
        self._restarts = 0

    def statistics(self) -> SupervisorStatistics:
        running = self._process is not None and self._process.returncode is None
        return SupervisorStatistics(
            pid=self._process.pid if running and self._process is not None else None,
            ready=running and self._ready_at_s is not None,
            restarts=self._restarts,
        )

    async def launch(self) -> None:
        """Start the first engine process; `run` follows it. Returns once it is started."""
        self._process = await self._start()

    async def run(self) -> None:
        """Follow the engine and start it again as often as it takes, until `stop`.

        Raises ConfigError when the first engine cannot start for a reason the user can mend, and
        EngineLost when engines keep failing.
        """
        assert self._process is not None, "launch first"
        quick_failures = 0
        while True:
            ended = await self._follow(self._process)
            if self._stopping.is_set():
                return
            if ended.failure and ended.exit_code == EXIT_CONFIG and not self._ever_ready:
                raise ConfigError(ended.failure)
            quick = ended.ready_s is None or ended.ready_s < self._policy.quick_s
            quick_failures = quick_failures + 1 if quick else 0
            most = self._policy.most_quick_failures
            if quick_failures > most:
                raise EngineLost(
                    f"{ended.describe()}; giving up after {quick_failures} quick failures"
                )
            wait_s = self._policy.wait_s(quick_failures)
            count = f" (quick failure {quick_failures} of {most})" if quick_failures else ""
            logger.error("%s; starting it again in %.1f s%s", ended.describe(), wait_s, count)
            if await self._wait_stopping(wait_s):
                return
            self._restarts += 1
            self._process = await self._start()
            if self._stopping.is_set():
                self.kill()  # `stop` came while it started

    async def stop(self) -> None:
        """End the engine: ask by closing its lifeline, insist after a while. Idempotent."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_GRACE_S)
        except TimeoutError:
            logger.warning("the engine did not stop within %.0f s; killing it", STOP_GRACE_S)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """End the engine at once."""
        self._stopping.set()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _start(self) -> Process:
        self._ready_at_s = None
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
        launch = EngineLaunch(
            config=self._config,
            socket_path=self._socket_path,
            log_level=self._log_level,
            restarts=self._restarts,
        )
        assert process.stdin is not None
        process.stdin.write(launch.to_json().encode() + b"\n")
        with suppress(ConnectionError):  # gone already: `_follow` will tell
            await process.stdin.drain()
        return process

    async def _follow(self, process: Process) -> _Ended:
        """Read what the engine says until it ends."""
        assert process.stdout is not None
        failure = ""
        async for line in process.stdout:
            try:
                status = status_from_line(line)
            except (ValueError, KeyError, TypeError):
                logger.warning("engine: %s", line.decode(errors="replace").rstrip())
                continue
            match status:
                case Progress(text):
                    self._on_progress(text)
                case Ready():
                    self._ready_at_s = time.monotonic()
                    self._ever_ready = True
                    self._on_ready(status)
                case Failure(text):
                    failure = text
        exit_code = await process.wait()
        since_s = self._ready_at_s
        self._ready_at_s = None
        return _Ended(exit_code, failure, None if since_s is None else time.monotonic() - since_s)

    async def _wait_stopping(self, wait_s: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), wait_s)
        return self._stopping.is_set()
