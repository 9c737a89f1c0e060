"""`jaxserve serve`: front end here, engine in a process of its own, signals, and the way out.

The engine process is started first, because loading JAX and compiling take longest; the front end
is imported and bound meanwhile. Ready means both.

The first SIGTERM or SIGINT drains: nothing new is admitted, what runs may finish within
`--drain_s`, the rest ends with UNAVAILABLE, exit code 0. A second signal n ends everything at once
with exit code 128 + n. Before the server is ready there is nothing to drain.

Configuration and address go to stdout; log, progress and errors go to stderr.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from rich.console import Console

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.models.text_files import read_text_files
from jaxserve.server.engine_launch import Ready
from jaxserve.server.identity import Gate
from jaxserve.server.logs import set_up_logging
from jaxserve.server.progress import ProgressDisplay
from jaxserve.server.supervisor import EngineLost, EngineSupervisor
from jaxserve.server_config import LogConfig, ServerConfig

if TYPE_CHECKING:
    from jaxserve.server.frontend import FrontendServer
    from jaxserve.server.model_text import ModelText

EXIT_ENGINE_LOST: Final = 1
MOST_SOCKET_PATH_CHARS: Final = 100
"""The kernel's limit is 104 bytes on some systems, 108 on others."""

logger = logging.getLogger(__name__)


def main(settings: Settings) -> int:
    """Serve until a signal; returns the exit code. Raises ConfigError if the user can mend it."""
    started_s = time.monotonic()
    server = settings.record(ServerConfig)
    with socket_directory() as directory:
        serving = _Serving(settings, directory, started_s)
        check_port(server.host, server.port)
        if server.http_port != -1 and server.port:
            check_port(server.host, server.http_port or server.port + 1, field="http_port")
        set_up_logging(settings.record(LogConfig).log_level)
        print(settings.describe(), flush=True)
        try:
            return asyncio.run(serving.run())
        except EngineLost as error:
            logger.critical("%s", error)
            return EXIT_ENGINE_LOST


def check_port(host: str, port: int, *, field: str = "port") -> None:
    """Raise ConfigError unless `host:port` can be bound, before anything slow is started."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host: got {host!r}: {error.strerror}; try 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # A port whose last owner just left can be bound at once, as the server itself will.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(
                f"{field}: got {port} on {host}: {error.strerror}; is another server using it? "
                f"try --{field}=0 for any free one"
            ) from None


@contextmanager
def socket_directory() -> Iterator[str]:
    """A fresh directory that only this user can enter, with a path short enough for a socket."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > MOST_SOCKET_PATH_CHARS - len("/jaxserve-12345678/engine.sock"):
        base = "/tmp"
    directory = tempfile.mkdtemp(prefix="jaxserve-", dir=base)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Serving:
    """One run of the server, from start to exit code."""

    def __init__(self, settings: Settings, directory: str, started_s: float):
        self._settings = settings
        self._engine = settings.record(EngineConfig)
        self._config = settings.record(ServerConfig)
        self._log = settings.record(LogConfig)
        # Read here, so that a damaged file is told of before anything slow is started.
        self._text_files = read_text_files(
            self._engine.model, chat_template=self._config.chat_template
        )
        self._gate = Gate(Path(self._config.api_keys) if self._config.api_keys else None)
        self._directory = directory
        self._started_s = started_s
        self._signalled = asyncio.Event()
        self._ready: asyncio.Future[Ready] | None = None
        self._progress = ProgressDisplay(Console(stderr=True))
        self._supervisor = EngineSupervisor(
            self._engine,
            socket_path=f"{directory}/engine.sock",
            log_level=self._log.log_level,
            on_progress=self._progress.show,
            on_ready=self._on_ready,
        )

    async def run(self) -> int:
        """Start, serve, drain, stop. Raises ConfigError and EngineLost."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        await self._supervisor.launch()
        engine = asyncio.create_task(self._supervisor.run())
        signalled = asyncio.create_task(self._signalled.wait())
        with ExitStack() as files:
            try:
                return await self._serve(engine, signalled, files)
            finally:
                self._progress.close()
                await self._supervisor.stop()
                for task in (engine, signalled):
                    task.cancel()
                await asyncio.wait((engine, signalled))

    async def _serve(
        self, engine: asyncio.Task[None], signalled: asyncio.Task[bool], files: ExitStack
    ) -> int:
        # Imported here: the engine loads JAX in the other process meanwhile.
        from jaxserve.server.desk import Desk
        from jaxserve.server.frontend import start_frontend
        from jaxserve.server.link import ReplicaLink
        from jaxserve.server.model_text import load_model_text
        from jaxserve.server.request_log import RequestLog

        with_defaults = self._config.sampling_defaults == "model"
        text = load_model_text(self._text_files, with_defaults=with_defaults)
        link = ReplicaLink(f"unix:{self._directory}/engine.sock")
        desk = Desk(
            link,
            text,
            cache=self._engine.cache.resolved(has_keys=self._gate.has_keys),
            gate=self._gate,
            request_log=RequestLog(self._open_request_log(files)),
        )
        frontend = await start_frontend(self._config, desk, configuration=self._settings.as_text())
        try:
            assert self._ready is not None
            if not await _first(self._ready, engine, signalled) or self._signalled.is_set():
                return 0
            link.start()
            await link.wait_ready()
            self._announce(self._ready.result(), frontend, text)
            await _first(signalled, engine)
            num_live, drain_s = frontend.statistics().live, self._config.drain_s
            logger.info("draining: up to %g s for %d live requests", drain_s, num_live)
            frontend.begin_drain()
            if not await frontend.wait_idle(drain_s):
                await frontend.end_rest()
            return 0
        finally:
            await frontend.stop()
            await link.close()

    def _on_signal(self, number: int) -> None:
        if not self._signalled.is_set():
            self._signalled.set()
            return
        # At once means at once: no handler, buffer or thread gets a say any more.
        self._supervisor.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
        os._exit(128 + number)

    def _on_ready(self, ready: Ready) -> None:
        assert self._ready is not None
        if self._ready.done():
            restarts = self._supervisor.statistics().restarts
            logger.info("the engine is back after %.1f s (restart %d)", ready.start_s, restarts)
        else:
            self._ready.set_result(ready)

    def _announce(self, ready: Ready, frontend: "FrontendServer", text: "ModelText") -> None:
        """The KV pool, the addresses, and lines to paste."""
        self._progress.close()
        host = "127.0.0.1" if self._config.host in ("0.0.0.0", "[::]") else self._config.host
        address = f"{host}:{frontend.port}"
        num_tokens = ready.num_pages * ready.page_size
        print(
            f"model {self._engine.model} on {ready.device}, {ready.num_programs} programs\n"
            f"KV pool: {ready.num_pages} pages of {ready.page_size} = {num_tokens} tokens\n"
            f"ready after {time.monotonic() - self._started_s:.1f} s"
            f" (engine {ready.start_s:.1f} s); serving gRPC at {address}",
            flush=True,
        )
        prompt = '--prompt="ROMEO:"' if text.tokenizer is not None else "--token_ids=1,2,3"
        lines = [f"try: jaxserve generate --server={address} {prompt}"]
        if frontend.http_port is not None:
            url = f"http://{host}:{frontend.http_port}/v1"
            print(f"serving HTTP at {url}, metrics at {url.removesuffix('/v1')}/metrics")
            if text.template is not None:
                body = '{"messages": [{"role": "user", "content": "Who art thou?"}]}'
                lines.append(f"     curl {url}/chat/completions -d '{body}'")
        print("\n".join(lines), flush=True)

    def _open_request_log(self, files: ExitStack) -> TextIO | None:
        path = self._log.request_log
        if not path:
            return None
        try:
            return files.enter_context(open(path, "a", encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"request_log: got {path!r}: {error.strerror}; try a file in another directory"
            ) from None


async def _first(
    wanted: asyncio.Future[Any], engine: asyncio.Task[None], *others: asyncio.Task[Any]
) -> bool:
    """Wait for one of them; whether it was `wanted`. Raises what ended `engine`."""
    await asyncio.wait((wanted, engine, *others), return_when=asyncio.FIRST_COMPLETED)
    if engine.done():
        engine.result()
    return wanted.done()
