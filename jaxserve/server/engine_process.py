"""The engine process: builds the engine, serves it on a local socket, and dies with its parent.

Knows pipes, signals and the socket. What goes over the socket is in `engine_service.py`, what goes
over the pipes in `engine_launch.py`.

The dispatch thread runs beside this process's main thread, which holds the event loop. Signals that
end a server reach its whole process group or control group; here they are ignored, because whether
to drain is the parent's decision. The parent ends this process by closing its stdin.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final

import grpc

from jaxserve.clock import MonotonicClock
from jaxserve.engine.build import build_engine
from jaxserve.engine.core import Rejection
from jaxserve.engine.garbage import settle_collector
from jaxserve.errors import ConfigError
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.request import Delta
from jaxserve.server.describe import describe
from jaxserve.server.engine_launch import (
    EXIT_CONFIG,
    EngineLaunch,
    Failure,
    Progress,
    Ready,
    Status,
    status_to_line,
)
from jaxserve.server.engine_service import EngineService
from jaxserve.server.logs import set_up_logging

EXIT_FAILED: Final = 1
STOP_S: Final = 3.0
"""Time to flush files and join threads once the parent has closed the lifeline."""

logger = logging.getLogger(__name__)


def main() -> int:
    """Run until the parent closes stdin; returns the exit code."""
    started_s = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    status_pipe = _take_stdout()

    def say(status: Status) -> None:
        status_pipe.write(status_to_line(status))

    line = _read_line()
    if not line:
        return 0  # the parent went before it said anything
    launch = EngineLaunch.from_json(line)
    set_up_logging(launch.log_level, process=launch.config.replica)
    lifeline = Lifeline()
    try:
        return asyncio.run(_serve(launch, lifeline, say, started_s))
    except ConfigError as error:
        say(Failure(" ".join(str(error).split())))
        return EXIT_CONFIG
    except Exception as error:
        logger.exception("the engine failed")
        say(Failure(f"{type(error).__name__}: {error}".splitlines()[0]))
        return EXIT_FAILED


def _take_stdout() -> BinaryIO:
    """The status pipe. What libraries print to stdout goes to stderr from now on."""
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return pipe


def _read_line() -> str:
    """The launch line. Stdin is read without Python's buffer: a thread that waits in one holds its
    lock, on which the interpreter's shutdown would die."""
    line = b""
    while not line.endswith(b"\n"):
        read = os.read(0, 1 << 16)
        if not read:
            return ""
        line += read
    return line.decode()


class Lifeline:
    """Waits in a thread for the parent to go, whatever the main thread does meanwhile.

    Until `on_end` is set, such as during compilation, the process simply ends.
    """

    def __init__(self) -> None:
        self.on_end: Callable[[], object] | None = None
        threading.Thread(target=self._wait, name="lifeline", daemon=True).start()

    def _wait(self) -> None:
        while os.read(0, 4096):
            pass
        if self.on_end is not None:
            self.on_end()
            time.sleep(STOP_S)
        os._exit(0)


async def _serve(
    launch: EngineLaunch, lifeline: Lifeline, say: Callable[[Status], None], started_s: float
) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(exit_code: int) -> None:
        if not ended.done():
            ended.set_result(exit_code)

    def on_report(dispatch: int, deltas: Sequence[Delta], rejections: Sequence[Rejection]) -> None:
        loop.call_soon_threadsafe(service.deliver, dispatch, deltas, rejections)

    def on_failure(error: BaseException) -> None:
        logger.critical("the dispatch thread failed", exc_info=error)
        loop.call_soon_threadsafe(end, EXIT_FAILED)

    # Building holds the loop, which has nothing else to do yet; the lifeline has its own thread.
    driver = build_engine(
        launch.config,
        on_report=on_report,
        on_failure=on_failure,
        progress=lambda text: say(Progress(text)),
    )
    settle_collector()
    description = describe(
        driver.info,
        driver.limits,
        dispatch_s=driver.core.config.dispatch_s,
        replica=launch.config.replica,
    )
    service = EngineService(
        driver, description=description, clock=MonotonicClock(), restarts=launch.restarts
    )
    server = grpc.aio.server(
        options=(("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    )
    pb_grpc.add_ReplicaServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{launch.socket_path}")
    driver.start()
    await server.start()
    lifeline.on_end = lambda: loop.call_soon_threadsafe(end, 0)
    say(
        Ready(
            num_pages=driver.info.num_pages,
            page_size=driver.info.page_size,
            num_programs=driver.info.programs,
            device=f"{driver.info.num_devices} x {driver.info.device_kind}",
            start_s=time.monotonic() - started_s,
        )
    )
    exit_code = await ended
    # grpc logs the cancellation of the streams that it is told to cancel here as an error of ours.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    await server.stop(grace=None)
    driver.stop()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
