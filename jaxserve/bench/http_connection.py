"""HTTP/1.1 and server-sent events, read by hand: a library would be slower than many a server.

Knows connections, heads, bodies and events, and of no request what it means.
"""

import asyncio
import time
from typing import Final

_HEAD_BYTES: Final = 1 << 16
_HEAD, _SIZED, _CHUNK_SIZE, _CHUNK, _TRAILER, _TO_END = range(6)


class Answer:
    """What comes of one request: its status, and its body, or with `streams` its events."""

    def __init__(self, *, streams: bool = False):
        self.status, self.body = 0, b""
        self._streams = streams

    def take(self, at_s: float, data: bytes) -> None:
        """A part of the body, which came at `at_s`; a stream keeps what is no whole line yet."""
        body = self.body + data if self.body else data
        if self.status != 200 or not self._streams:
            self.body = body
            return
        lines = body.split(b"\n")
        self.body = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self.take_event(at_s, line[5:].strip())

    def take_event(self, at_s: float, data: bytes) -> None:
        """The data of one event; a stream's answer does something with it."""


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time. It is in `all_open` while it is open."""

    def __init__(self, all_open: "set[Connection]") -> None:
        self._all_open = all_open
        self._transport: asyncio.Transport | None = None
        self._in, self._place = b"", 0  # what came, and how much of it was taken
        self._state = _HEAD
        self._left = 0
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._keep = True

    @property
    def usable(self) -> bool:
        """Open, and no answer is on its way."""
        open_ = self._transport is not None and not self._transport.is_closing()
        return open_ and self._answer is None and self._keep

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, data: bytes, answer: Answer) -> None:
        """Send a request and read its answer. Raises OSError when the connection fails."""
        assert self._transport is not None and self._answer is None
        self._answer, self._state = answer, _HEAD
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        await self._ended

    # ---------------------------------------------------------------- asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._all_open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._all_open.discard(self)
        if self._answer is None or self._ended is None or self._ended.done():
            return
        if self._state == _TO_END and exc is None:
            self._end()
        else:
            error = ConnectionResetError("the server closed the connection before the answer's end")
            self._ended.set_exception(exc if isinstance(exc, OSError) else error)

    def data_received(self, data: bytes) -> None:
        at_s = time.perf_counter()
        self._in, self._place = self._in + data if self._in else data, 0
        try:
            while self._answer is not None and self._step(self._answer, at_s):
                pass
        except ValueError as error:
            self._fail(str(error))
        self._in = self._in[self._place :]

    # ---------------------------------------------------------------- the answer, piece by piece

    def _fail(self, message: str) -> None:
        self._keep = False
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(ConnectionAbortedError(f"not HTTP/1.1: {message}"))

    def _end(self) -> None:
        self._answer = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _step(self, answer: Answer, at_s: float) -> bool:
        """Take one piece; False: it is not all there yet. Raises ValueError for what is none."""
        state = self._state
        if state == _CHUNK:
            end = self._place + self._left
            if len(self._in) < end + 2:
                return False
            answer.take(at_s, self._in[self._place : end])
            self._place, self._state = end + 2, _CHUNK_SIZE
        elif state == _CHUNK_SIZE:
            line = self._line()
            if line is None:
                return False
            self._left = int(line.partition(b";")[0], 16)
            self._state = _CHUNK if self._left else _TRAILER
        elif state == _TRAILER:
            line = self._line()
            if line is None:
                return False
            if not line:
                self._end()
        elif state == _HEAD:
            return self._take_head(answer)
        else:
            return self._take_plain(answer, at_s)
        return True

    def _take_plain(self, answer: Answer, at_s: float) -> bool:
        """A body that is not in chunks."""
        size = len(self._in) - self._place
        if self._state == _SIZED:
            size = min(self._left, size)
        if not size:
            return False
        answer.take(at_s, self._in[self._place : self._place + size])
        self._place += size
        if self._state == _SIZED:
            self._left -= size
            if not self._left:
                self._end()
        return True

    def _line(self) -> bytes | None:
        end = self._in.find(b"\r\n", self._place)
        if end < 0:
            return None
        line = self._in[self._place : end]
        self._place = end + 2
        return line

    def _take_head(self, answer: Answer) -> bool:
        end = self._in.find(b"\r\n\r\n", self._place)
        if end < 0:
            if len(self._in) > _HEAD_BYTES:
                raise ValueError("a head without end")
            return False
        status, *lines = self._in[self._place : end].decode("latin-1").split("\r\n")
        self._place = end + 4
        fields = {
            name.lower(): value.strip() for name, _, value in (s.partition(":") for s in lines)
        }
        if not status.startswith("HTTP/1."):
            raise ValueError(f"got {status[:80]!r}")
        answer.status = int(status.split()[1])
        if answer.status < 200:
            return True  # 100 Continue and the like: the real head follows
        if fields.get("connection", "").lower() == "close" or status.startswith("HTTP/1.0"):
            self._keep = False
        if "chunked" in fields.get("transfer-encoding", "").lower():
            self._state = _CHUNK_SIZE
        elif "content-length" in fields:
            self._state, self._left = _SIZED, int(fields["content-length"])
            if not self._left:
                self._end()
        else:
            self._state, self._keep = _TO_END, False
        return True
