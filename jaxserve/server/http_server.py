"""Serves an ASGI application on a port, on the event loop that is running. Wraps uvicorn."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from jaxserve.errors import ConfigError


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `serve`'s: what drains is the whole server."""
        yield


class HttpServer:
    """A listening HTTP server; made by `start`."""

    def __init__(self, server: _Uvicorn, listener: socket.socket):
        self._server = server
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, app: ASGIApp, *, host: str, port: int) -> "HttpServer":
        """Listen on `host:port`; port 0 takes any free one. Raises ConfigError if it is taken."""
        listener = _listen(host, port)
        # What uvicorn has to say below a warning says nothing that we do not say ourselves.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        config = uvicorn.Config(
            app,
            # Bounds what a client may send before its request is whole, which httptools does not.
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        self = cls(_Uvicorn(config), listener)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.001)
        return self

    async def stop(self) -> None:
        """Close the port and every connection at once."""
        assert self._task is not None
        self._server.should_exit = self._server.force_exit = True
        await asyncio.wait([self._task])
        self._listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"http_port: got {port} on {host}: {error.strerror}; is another server using it? try"
            " --http_port=0 for any free one, or -1 for no HTTP"
        ) from None
    listener.setblocking(False)
    return listener
