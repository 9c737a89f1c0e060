"""One HTTP call: its head and body, and the answer's beginning, middle and end. Knows no endpoint.

A client that goes away has its call's work cancelled: the body has been read by then, so the next
thing that `receive` says is that it left.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.errors import JaxserveError, NotReady, QueueFull, TooLarge, Unauthenticated
from jaxserve.server.openai_answer import error_body
from jaxserve.server.request_log import log_fault

REQUEST_ID_HEADER: Final = "x-request-id"
RETRY_S: Final = 1
"""What Retry-After says of a server that is loading or draining."""


class Call:
    """One HTTP call: what was asked, and the answer's beginning, middle and end."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._request = Request(scope, receive)
        self._receive, self._send = receive, send
        self.started = False
        self.request_id = ""
        self.headers: dict[str, str] = dict(self._request.headers)
        self.path: str = self._request.url.path
        self.path_params: dict[str, str] = self._request.path_params
        client = self._request.client
        self.peer = "http:unknown" if client is None else f"http:{client.host}:{client.port}"

    async def body(self, allowed: int) -> bytes:
        """The body, read no further than it may be long. Raises TooLarge."""
        data = bytearray()
        async for part in self._request.stream():
            data += part
            if len(data) > allowed:
                raise TooLarge("body", f"more than {allowed} bytes", f"at most {allowed} bytes")
        return bytes(data)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, and cancel it when the client goes. The body must have been read."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(self._gone())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        if not task.cancelled():
            task.result()

    async def respond(self, body: dict[str, Any], *, status: int = 200, **headers: str) -> None:
        """Answer with JSON, whole."""
        content = msgspec.json.encode(body)
        await self.write(content, status=status, media_type="application/json", **headers)

    async def write(
        self, content: bytes, *, status: int = 200, media_type: str, **headers: str
    ) -> None:
        """Answer, whole. Keywords are header names with underscores."""
        await self._start(status, media_type, content_length=str(len(content)), **headers)
        await self._send({"type": "http.response.body", "body": content})

    async def begin_stream(self) -> None:
        """Begin to answer with server-sent events."""
        await self._start(200, "text/event-stream", cache_control="no-cache")

    async def write_events(self, *bodies: dict[str, Any]) -> None:
        events = b"".join(map(event, bodies))
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_stream(self, last: bytes) -> None:
        await self._send({"type": "http.response.body", "body": last})

    async def refuse(self, error: JaxserveError) -> None:
        """Answer with an error: a response of its own, or a stream's last event."""
        if self.started:
            await self.end_stream(event(error_body(error)))
            return
        headers: dict[str, str] = {}
        match error:
            case QueueFull():
                headers["retry_after"] = str(math.ceil(error.retry_after_s))
            case NotReady():
                headers["retry_after"] = str(RETRY_S)
            case Unauthenticated():
                headers["www_authenticate"] = "Bearer"
            case TooLarge():
                headers["connection"] = "close"  # the rest of the body will not be read
        await self.respond(error_body(error), status=error.http_status, **headers)

    async def _start(self, status: int, media_type: str, **headers: str) -> None:
        self.started = True
        if self.request_id:
            headers[REQUEST_ID_HEADER] = self.request_id
        headers["content_type"] = media_type
        encoded = [
            (name.replace("_", "-").encode(), value.encode("latin-1"))
            for name, value in headers.items()
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Endpoint:
    """An ASGI application of one function, whose errors are answers."""

    def __init__(self, run: Callable[[Call], Awaitable[None]]):
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        try:
            await self._run(call)
        except JaxserveError as error:
            await call.refuse(error)
        except ClientDisconnect:
            pass  # it left while it was still speaking
        except Exception:
            await call.refuse(log_fault(f"serving {call.path}"))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    content = msgspec.json.encode({"error": body})
    headers = {**(error.headers or {}), "content-type": "application/json"}
    return Response(content, status_code=error.status_code, headers=headers)


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
