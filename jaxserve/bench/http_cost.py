"""What HTTP costs over gRPC: the same streams through one and the other, by turns, on one server.

All of the server runs on one core, the client on another. Streams are a closed loop: each begins
its next request when its last one ends. The client of HTTP reads its sockets by itself, because a
library would be slower than what is measured.

Most of the time to the first token is a wait for the slice that is running, which varies with how
requests happen to meet slices. So there is also the share that passed outside of the front end, the
client's mean less the front end's own: bytes on their way, and processes waiting for the core.
"""

import asyncio
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import numpy as np

from jaxserve.bench.peers.jaxserve_peer import Server, serving
from jaxserve.client import AsyncClient
from jaxserve.request import SamplingParams

GRPC: Final = "gRPC"
HTTP: Final = "HTTP"
LEAST_RATE: Final = 0.90
"""Tokens/s of HTTP over gRPC's that are wanted."""
MOST_MORE_TTFT_S: Final = 0.005
"""Longer wait for the first token that is allowed."""

_DONE: Final = b"[DONE]"
_GAPS: Final = "jaxserve_delivery_gap_seconds_count"
_FIRST_TOKENS_S: Final = "jaxserve_time_to_first_token_seconds_sum"
_SPEAKERS: Final = ("ROMEO", "JULIET", "GLOUCESTER", "KING EDWARD IV", "QUEEN MARGARET", "CLARENCE")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a text or token ids, and how many tokens the answer has, whatever they are."""

    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `events` are those that brought tokens."""

    ttft_s: float
    events: int
    tokens: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """All requests through one dialect.

    `deliveries` counts what slices brought, stream by stream. `ttft_s` [requests] is the client's
    time to the first token, `front_end_ttft_s` the mean of the front end's. CPU times are seconds.
    """

    dialect: str
    num_requests: int
    tokens: int
    events: int
    deliveries: int
    wall_s: float
    ttft_s: np.ndarray
    front_end_ttft_s: float
    front_end_cpu_s: float
    client_cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def outside_s(self) -> float:
        """Mean time to the first token that passed outside of the front end."""
        return float(self.ttft_s.mean()) - self.front_end_ttft_s


@dataclass(frozen=True, slots=True)
class HttpCost:
    """A whole measurement, rounds in order."""

    rounds: tuple[Round, ...]

    @property
    def rate(self) -> float:
        """Tokens/s of HTTP over gRPC's, over all rounds."""
        grpc, http = (self._sum(dialect) for dialect in (GRPC, HTTP))
        return http.tokens_per_s / grpc.tokens_per_s

    @property
    def more_ttft_s(self) -> float:
        """How much longer the first token takes in the mean; waiting for slices makes it vary."""
        grpc, http = (self._sum(dialect) for dialect in (GRPC, HTTP))
        return float(http.ttft_s.mean() - grpc.ttft_s.mean())

    @property
    def more_outside_s(self) -> float:
        """How much longer the first token takes outside of the front end."""
        grpc, http = (self._sum(dialect) for dialect in (GRPC, HTTP))
        return http.outside_s - grpc.outside_s

    @property
    def passed(self) -> bool:
        return self.rate >= LEAST_RATE and self.more_ttft_s <= MOST_MORE_TTFT_S

    def report(self) -> Iterator[str]:
        """The table's lines: every round, both dialects over all rounds, and how they compare."""
        yield (
            "dialect  tokens  tokens/s  TTFT ms: mean    p50    p99  outside  events  deliveries"
            "  per stream  front end ms  client load"
        )
        for part in (*self.rounds, self._sum(GRPC), self._sum(HTTP)):
            ttft, per_stream = part.ttft_s * 1e3, part.events / part.num_requests
            yield (
                f"{part.dialect:7s}  {part.tokens:6d}  {part.tokens_per_s:8.0f}"
                f"  {ttft.mean():13.1f}  {np.percentile(ttft, 50):5.1f}"
                f"  {np.percentile(ttft, 99):5.1f}  {part.outside_s * 1e3:7.2f}"
                f"  {part.events:6d}  {part.deliveries:10d}  {per_stream:10.2f}"
                f"  {1e3 * part.front_end_cpu_s / part.num_requests:12.2f}"
                f"  {part.client_cpu_s / part.wall_s:11.2f}"
            )
        yield (
            f"HTTP / gRPC: {self.rate:.3f} of the tokens/s (wanted: {LEAST_RATE:.2f} or more);"
            f" TTFT {self.more_ttft_s * 1e3:+.1f} ms in the mean"
            f" (wanted: at most {MOST_MORE_TTFT_S * 1e3:+.1f}),"
            f" {self.more_outside_s * 1e3:+.1f} ms of it outside of the front end"
        )

    def _sum(self, dialect: str) -> Round:
        parts = [part for part in self.rounds if part.dialect == dialect]
        num_requests = sum(part.num_requests for part in parts)
        front_end_ttft_s = sum(part.front_end_ttft_s * part.num_requests for part in parts)
        return Round(
            dialect=dialect,
            num_requests=num_requests,
            tokens=sum(part.tokens for part in parts),
            events=sum(part.events for part in parts),
            deliveries=sum(part.deliveries for part in parts),
            wall_s=sum(part.wall_s for part in parts),
            ttft_s=np.concatenate([part.ttft_s for part in parts]),
            front_end_ttft_s=front_end_ttft_s / num_requests,
            front_end_cpu_s=sum(part.front_end_cpu_s for part in parts),
            client_cpu_s=sum(part.client_cpu_s for part in parts),
        )


def measure(
    *,
    model: str,
    num_streams: int,
    num_requests: int,
    mean_tokens: int,
    num_rounds: int,
    server_core: int,
    client_core: int,
    serve_flags: Sequence[str] = (),
) -> HttpCost:
    """`num_rounds` rounds of each dialect by turns, after one of each that does not count.

    Raises RuntimeError when an answer is not the one that the other dialect gave, or when there
    are more events than slices brought.
    """
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {server_core})  # what is started now stays there
    try:
        with serving([f"--max_rows={num_streams}", *serve_flags], model=model) as server:
            os.sched_setaffinity(0, {client_core})
            return asyncio.run(_run(server, num_streams, num_requests, mean_tokens, num_rounds))
    finally:
        os.sched_setaffinity(0, all_cores)


def make_asks(
    count: int, *, mean_tokens: int, vocab_size: int, with_text: bool, seed: int = 0
) -> list[Ask]:
    """Prompts shorter than a page, so that none is cached; lengths vary, lest all end at once."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(mean_tokens // 2, mean_tokens * 3 // 2, count, endpoint=True)
    asks = []
    for number, length in enumerate(lengths.tolist()):
        speaker = _SPEAKERS[number % len(_SPEAKERS)]
        text = f"{speaker}:\nThis is my word number {number}:"
        ids = rng.integers(0, vocab_size, 16).tolist()
        asks.append(Ask(text if with_text else ids, length))
    return asks


# ------------------------------------------------------------------------------------ rounds


async def _run(
    server: Server, num_streams: int, num_requests: int, mean_tokens: int, num_rounds: int
) -> HttpCost:
    async with AsyncClient(server.target) as client:
        info = await client.model_info()
    asks = make_asks(
        num_requests,
        mean_tokens=mean_tokens,
        vocab_size=info.vocab_size,
        with_text=info.has_tokenizer,
    )
    rounds, texts = [], None
    for number in range(-1, num_rounds):
        for dialect in (GRPC, HTTP):
            answers, measured = await _round(server, dialect, asks, num_streams)
            if texts is None:
                texts = [answer.text for answer in answers]
            _check(measured, asks, answers, texts)
            if number >= 0:
                rounds.append(measured)
    return HttpCost(tuple(rounds))


def _check(
    measured: Round, asks: Sequence[Ask], answers: Sequence[Answer], texts: Sequence[str]
) -> None:
    for ask, answer, text in zip(asks, answers, texts, strict=True):
        if answer.tokens != ask.max_tokens:
            raise RuntimeError(f"asked for {ask.max_tokens} tokens, got {answer.tokens}")
        if answer.text != text:
            raise RuntimeError(f"{measured.dialect}: got {answer.text!r}, before it was {text!r}")
    if measured.events > measured.deliveries:
        raise RuntimeError(f"{measured.events} events of {measured.deliveries} deliveries")


async def _round(
    server: Server, dialect: str, asks: Sequence[Ask], num_streams: int
) -> tuple[list[Answer], Round]:
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(asks))

    async def run(speak: _Speak) -> None:
        for number, ask in waiting:
            answers[number] = await speak(ask)

    async with AsyncExitStack() as stack:
        if dialect == GRPC:
            client = await stack.enter_async_context(AsyncClient(server.target))
            speakers = [_grpc_speaker(client)] * num_streams
        else:
            speakers = [
                await stack.enter_async_context(_http_speaker(server.url))
                for _ in range(num_streams)
            ]
        gaps, first_tokens_s = _scrape(server)
        front_end_s, client_s = _cpu_s(server.pid), time.process_time()
        began_s = time.perf_counter()
        await asyncio.gather(*map(run, speakers))
        wall_s = time.perf_counter() - began_s
        front_end_s, client_s = _cpu_s(server.pid) - front_end_s, time.process_time() - client_s
    gaps_after, first_tokens_after_s = _scrape(server)
    ordered = [answers[number] for number in range(len(asks))]
    measured = Round(
        dialect=dialect,
        num_requests=len(asks),
        tokens=sum(answer.tokens for answer in ordered),
        events=sum(answer.events for answer in ordered),
        deliveries=gaps_after - gaps + len(asks),  # a stream's first delivery ends no gap
        wall_s=wall_s,
        ttft_s=np.array([answer.ttft_s for answer in ordered]),
        front_end_ttft_s=(first_tokens_after_s - first_tokens_s) / len(asks),
        front_end_cpu_s=front_end_s,
        client_cpu_s=client_s,
    )
    return ordered, measured


def _scrape(server: Server) -> tuple[int, float]:
    """Gaps between two deliveries to one stream, and the sum of all times to first tokens."""
    url = server.url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(url, timeout=30) as page:
        lines = page.read().decode().splitlines()
    gaps, first_tokens_s = (
        sum(float(line.split()[-1]) for line in lines if line.startswith(name))
        for name in (_GAPS, _FIRST_TOKENS_S)
    )
    return int(gaps), first_tokens_s


def _cpu_s(pid: int) -> float:
    """User and system seconds of a process, without its children (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------- dialects

_Speak = Callable[[Ask], Awaitable[Answer]]


def _grpc_speaker(client: AsyncClient) -> _Speak:
    async def speak(ask: Ask) -> Answer:
        began_s, first_s = time.perf_counter(), 0.0
        events, tokens, texts = 0, 0, []
        params = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True)
        async for chunk in client.generate(ask.prompt, sampling=params):
            first_s = first_s or time.perf_counter()
            events += 1
            tokens += len(chunk.token_ids)
            texts.append(chunk.text)
        return Answer(first_s - began_s, events, tokens, "".join(texts))

    return speak


class _Choice(msgspec.Struct):
    text: str


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_decode_event: Final = msgspec.json.Decoder(_Event).decode


@asynccontextmanager
async def _http_speaker(url: str) -> AsyncIterator[_Speak]:
    """A connection that is kept for one request after the other."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST {place.path}/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"

    async def speak(ask: Ask) -> Answer:
        began_s, first_s = time.perf_counter(), 0.0
        events, tokens, texts = 0, 0, []
        body = msgspec.json.encode(
            {
                "prompt": ask.prompt,
                "max_tokens": ask.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + fields).encode() + body)
        async for data in _events(reader):
            event = _decode_event(data)
            if event.choices:
                first_s = first_s or time.perf_counter()
                events += 1
                texts.append(event.choices[0].text)
            elif event.usage is not None:
                tokens = event.usage.completion_tokens
        return Answer(first_s - began_s, events, tokens, "".join(texts))

    try:
        yield speak
    finally:
        writer.close()
        await writer.wait_closed()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of a response's events, without the last, "[DONE]". Reads the response whole."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 ") or b"chunked" not in head:
        raise RuntimeError(f"not a stream: {head.decode('latin-1')}")
    pending, done = b"", False
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pending += (await reader.readexactly(size + 2))[:-2]
        *whole, pending = pending.split(b"\n\n")
        for event in whole:
            data = event.removeprefix(b"data: ")
            if data == _DONE:
                done = True
            else:
                yield data
    await reader.readexactly(2)
    if not done:
        raise RuntimeError("a stream ended before its time")
