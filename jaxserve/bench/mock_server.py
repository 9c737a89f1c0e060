"""A server that costs next to nothing: what a load client can sustain is measured against it.

Run as a process: `python -m jaxserve.bench.mock_server --tokens_per_message=8 --stream_rate=10`.
Every answer has as many tokens as were asked for, in messages of `tokens_per_message` at a pace of
`stream_rate` tokens per second and stream. Streams get their messages at times of their own, so
that they do not all come at once. Both dialects are written by hand and whole messages are encoded
once, because a library would be the bottleneck. gRPC's knows the Generate call alone and takes any
call for it; HTTP's knows /v1/completions and /v1/chat/completions likewise. Knows no model.
"""

import argparse
import asyncio
import json
import struct
import time
from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

from jaxserve.proto import jaxserve_v1_pb2 as pb

TICK_S: Final = 0.005

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW = 0, 1, 3, 4, 6, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_WINDOW_BYTES: Final = 1 << 30
_GIVE_BACK_BYTES: Final = 1 << 24


@runtime_checkable
class Stream(Protocol):
    """An answer on its way. `step` writes its next message; True: that was the last."""

    def step(self) -> bool: ...


class Pacer:
    """Steps every stream each `interval_s`, a slot of them per tick."""

    def __init__(self, interval_s: float, *, tick_s: float = TICK_S):
        self._slots: list[set[Stream]] = [set() for _ in range(max(1, round(interval_s / tick_s)))]
        self._tick_s = tick_s
        self._place = 0
        self.late_s = 0.0
        self.flushes: set[Callable[[], None]] = set()

    def add(self, stream: Stream) -> int:
        """Its first message comes with the next tick. Returns its slot, for `drop`."""
        slot = (self._place + 1) % len(self._slots)
        self._slots[slot].add(stream)
        return slot

    def drop(self, stream: Stream, slot: int) -> None:
        self._slots[slot].discard(stream)

    async def run(self) -> None:
        """Ticks for ever. `late_s` is the most that a tick came late."""
        due_s = time.monotonic()
        while True:
            due_s += self._tick_s
            wait_s = due_s - time.monotonic()
            self.late_s = max(self.late_s, -wait_s)
            await asyncio.sleep(max(0.0, wait_s))
            self._place = (self._place + 1) % len(self._slots)
            slot = self._slots[self._place]
            for stream in [stream for stream in slot if stream.step()]:
                slot.discard(stream)
            for flush in self.flushes:
                flush()
            self.flushes.clear()


class Answers:
    """Answers in one dialect: messages of `tokens_per_message`, each encoded once."""

    def __init__(self, encode: Callable[[int, int | None], bytes], tokens_per_message: int):
        """`encode(tokens, whole)`: a message; `whole`: of the last, the answer's length."""
        self._encode, self.tokens_per_message = encode, tokens_per_message
        self._full = encode(tokens_per_message, None)

    def message(self, made: int, wanted: int) -> tuple[bytes, int]:
        """The next message of an answer of `wanted` tokens, and how many it brings."""
        if wanted - made > self.tokens_per_message:
            return self._full, self.tokens_per_message
        return self._encode(wanted - made, wanted), wanted - made


# ------------------------------------------------------------------------------------- gRPC


def encode_grpc(tokens: int, whole: int | None) -> bytes:
    """A length-prefixed GenerateResponse."""
    message = pb.GenerateResponse(request_id="f" * 20, token_ids=range(1000, 1000 + tokens))
    if whole is not None:
        message.finish.reason = pb.FINISH_REASON_LENGTH
        message.usage.completion_tokens = whole
    data = message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field that no table keeps (RFC 7541, 6.2.2), its texts as they are."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


_ANSWER_HEAD: Final = b"\x88" + _literal(b"content-type", b"application/grpc")  # :status 200
_ANSWER_END: Final = _literal(b"grpc-status", b"0")


class _GrpcStream:
    __slots__ = ("_connection", "_made", "_number", "_wanted", "body", "slot")

    def __init__(self, connection: "GrpcConnection", number: int):
        self._connection, self._number = connection, number
        self.body = bytearray()
        self._made = self._wanted = 0
        self.slot = -1

    def begin(self, pacer: Pacer) -> None:
        request = pb.GenerateRequest.FromString(bytes(self.body[5:]))
        self._wanted = request.sampling.max_tokens
        head = _frame(_HEADERS, _END_HEADERS, self._number, _ANSWER_HEAD)
        self._connection.send(head)
        self.slot = pacer.add(self)

    def step(self) -> bool:
        data, tokens = self._connection.answers.message(self._made, self._wanted)
        if not self._connection.send_data(self._number, data):
            return False  # the client's window is full: the same message again
        self._made += tokens
        if self._made < self._wanted:
            return False
        ends = _END_HEADERS | _END_STREAM
        self._connection.send(_frame(_HEADERS, ends, self._number, _ANSWER_END))
        self._connection.streams.pop(self._number, None)
        return True


class GrpcConnection(asyncio.Protocol):
    """As much HTTP/2 (RFC 9113) as Generate calls need. Windows of single streams, which the few
    bytes of an answer never fill, are left alone."""

    def __init__(self, answers: Answers, pacer: Pacer):
        self.answers, self._pacer = answers, pacer
        self.streams: dict[int, _GrpcStream] = {}
        self._in, self._out = bytearray(), bytearray()
        self._begun = False
        self._window, self._taken = 65535, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        window = struct.pack(">HI", 4, _WINDOW_BYTES)  # SETTINGS_INITIAL_WINDOW_SIZE
        self.send(_frame(_SETTINGS, 0, 0, window))
        self.send(_frame(_WINDOW, 0, 0, struct.pack(">I", _WINDOW_BYTES)))

    def connection_lost(self, exc: Exception | None) -> None:
        for stream in self.streams.values():
            self._pacer.drop(stream, stream.slot)
        self.streams.clear()

    def send(self, data: bytes) -> None:
        self._out += data
        self._pacer.flushes.add(self._flush)

    def send_data(self, stream: int, data: bytes) -> bool:
        """Whether the window had room."""
        if len(data) > self._window:
            return False
        self._window -= len(data)
        self.send(_frame(_DATA, 0, stream, data))
        return True

    def _flush(self) -> None:
        if self._out and not self._transport.is_closing():
            self._transport.write(bytes(self._out))
        self._out.clear()

    def data_received(self, data: bytes) -> None:
        self._in += data
        if not self._begun:
            if len(self._in) < len(_PREFACE):
                return
            self._begun = True
            del self._in[: len(_PREFACE)]
        place, held = 0, self._in
        while len(held) - place >= 9:
            size = int.from_bytes(held[place : place + 3], "big")
            if len(held) - place - 9 < size:
                break
            kind, flags, number = struct.unpack_from(">BBI", held, place + 3)
            self._on_frame(kind, flags, number, bytes(held[place + 9 : place + 9 + size]))
            place += 9 + size
        del held[:place]
        if self._taken > _GIVE_BACK_BYTES:
            self.send(_frame(_WINDOW, 0, 0, struct.pack(">I", self._taken)))
            self._taken = 0

    def _on_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _HEADERS:
            self.streams[number] = _GrpcStream(self, number)
        elif kind == _DATA:
            self._taken += len(payload)
            stream = self.streams.get(number)
            if stream is not None:
                stream.body += payload
                if flags & _END_STREAM:
                    stream.begin(self._pacer)
        elif kind == _RESET:
            stream = self.streams.pop(number, None)
            if stream is not None:
                self._pacer.drop(stream, stream.slot)
        elif kind == _SETTINGS and not flags & _ACK:
            self.send(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.send(_frame(_PING, _ACK, 0, payload))
            self._flush()
        elif kind == _WINDOW and number == 0:
            self._window += int.from_bytes(payload, "big")


# ------------------------------------------------------------------------------------- HTTP


def encode_http(tokens: int, whole: int | None) -> bytes:
    """An event of a completion's stream as a chunk; the last with usage, `[DONE]` and the end."""
    body: dict[str, Any] = {
        "id": "cmpl-" + "f" * 20,
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "mock",
        "choices": [{"index": 0, "text": " word" * tokens, "finish_reason": None}],
    }
    body["choices"][0]["token_ids"] = list(range(1000, 1000 + tokens))
    if whole is None:
        return _chunk(_event(body))
    body["choices"][0]["finish_reason"] = "length"
    usage = {"prompt_tokens": 1, "completion_tokens": whole, "total_tokens": whole + 1}
    rest = _event(body) + _event(body | {"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
    return _chunk(rest) + b"0\r\n\r\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


_HTTP_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class HttpConnection(asyncio.Protocol):
    """One request after the other; what follows before an answer's end waits."""

    def __init__(self, answers: Answers, pacer: Pacer):
        self._answers, self._pacer = answers, pacer
        self._in = bytearray()
        self._made = self._wanted = 0
        self._slot = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._pacer.drop(self, self._slot) if self._slot >= 0 else None

    def data_received(self, data: bytes) -> None:
        self._in += data
        head, separator, rest = bytes(self._in).partition(b"\r\n\r\n")
        if not separator or self._wanted:
            return
        size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(rest) < size:
            return
        body = json.loads(rest[:size])
        self._wanted, self._made = body.get("max_tokens") or body["max_completion_tokens"], 0
        del self._in[: len(head) + 4 + size]
        self._transport.write(_HTTP_HEAD)
        self._slot = self._pacer.add(self)

    def step(self) -> bool:
        data, tokens = self._answers.message(self._made, self._wanted)
        self._made += tokens
        self._transport.write(data)
        if self._made < self._wanted:
            return False
        self._wanted, self._slot = 0, -1
        return True


async def serve(*, tokens_per_message: int, stream_rate: float) -> None:
    """Serve until cancelled; prints "gRPC <port> HTTP <port>" when ready."""
    pacer = Pacer(tokens_per_message / stream_rate)
    grpc, http = (Answers(it, tokens_per_message) for it in (encode_grpc, encode_http))
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: GrpcConnection(grpc, pacer), "127.0.0.1", 0, backlog=4096),
        await loop.create_server(lambda: HttpConnection(http, pacer), "127.0.0.1", 0, backlog=4096),
    ]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    print(f"gRPC {ports[0]} HTTP {ports[1]}", flush=True)
    await pacer.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens_per_message", type=int, default=8)
    parser.add_argument("--stream_rate", type=float, default=10.0, help="tokens/s of a stream")
    options = parser.parse_args()
    try:
        asyncio.run(
            serve(tokens_per_message=options.tokens_per_message, stream_rate=options.stream_rate)
        )
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
