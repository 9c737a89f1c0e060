"""What the load client itself sustains on one core: streams, tokens/s, and how late it gets.

The server is `mock_server.py`, on a core of its own, so that the client is the bottleneck if there
is one. Requests come at even distances, so many that as many streams are open as are wanted
once the first ones end; from then on is measured.
"""

import asyncio
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from jaxserve.bench.grpc_transport import GrpcTransport
from jaxserve.bench.http_transport import HttpTransport
from jaxserve.bench.load_client import LoadClient
from jaxserve.bench.tally import Tally
from jaxserve.bench.transport import Asking, Transport
from jaxserve.report.recorder import Recorder
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work, Workload

DIALECTS: Final = ("grpc", "openai")
LEAST_STREAMS: Final = 2000
LEAST_TOKENS_PER_S: Final = 20_000
PROMPT_TOKENS: Final = 256
_SAMPLE_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCost:
    """One measurement. `streams` is the least that were open at a time; loads are CPU seconds per
    second."""

    dialect: str
    tokens_per_message: int
    streams: int
    tokens_per_s: float
    messages_per_s: float
    requests_per_s: float
    client_load: float
    server_load: float
    late_p50_s: float
    late_p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    num_failed: int

    @property
    def passed(self) -> bool:
        enough = self.streams >= LEAST_STREAMS and self.tokens_per_s >= LEAST_TOKENS_PER_S
        return enough and not self.num_failed

    @staticmethod
    def head() -> str:
        return (
            "dialect  tokens/message  streams  tokens/s  messages/s  requests/s  client load"
            "  server load  late ms p50    p99  TTFT ms p50    p99  failed"
        )

    def line(self) -> str:
        return (
            f"{self.dialect:7s}  {self.tokens_per_message:14d}  {self.streams:7d}"
            f"  {self.tokens_per_s:8.0f}  {self.messages_per_s:10.0f}  {self.requests_per_s:10.1f}"
            f"  {self.client_load:11.2f}  {self.server_load:11.2f}"
            f"  {1e3 * self.late_p50_s:11.2f}  {1e3 * self.late_p99_s:5.1f}"
            f"  {1e3 * self.ttft_p50_s:11.1f}  {1e3 * self.ttft_p99_s:5.1f}  {self.num_failed:6d}"
        )


@dataclass(frozen=True, slots=True)
class MockServer:
    """A running mock server: its ports and process."""

    grpc_port: int
    http_port: int
    pid: int


@contextmanager
def mock_server(*, tokens_per_message: int, stream_rate: float) -> Iterator[MockServer]:
    """A mock server on the cores that this process may use now, while the context lasts."""
    command = [sys.executable, "-m", "jaxserve.bench.mock_server"]
    command += [f"--tokens_per_message={tokens_per_message}", f"--stream_rate={stream_rate}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            if len(words) != 4:
                raise RuntimeError("the mock server ended before it was ready")
            yield MockServer(int(words[1]), int(words[3]), process.pid)
        finally:
            process.kill()


def even_workload(num_requests: int, rate: float, tokens: int) -> Workload:
    """`num_requests` equal requests, `rate` per second, of `tokens` output tokens each."""

    def requests() -> Iterator[Work]:
        for number in range(num_requests):
            yield Work(
                number=number,
                arrival_s=number / rate,
                prompt_tokens=PROMPT_TOKENS,
                output_tokens=tokens,
                max_tokens=tokens,
                client=f"client-{number % 16}",
            )

    return Workload(name="even", requests=requests, num_requests=num_requests, has_clients=True)


def measure(
    dialect: str,
    *,
    tokens_per_message: int,
    streams: int,
    stream_rate: float,
    answer_tokens: int,
    seconds: float,
    server_core: int,
    client_core: int,
) -> ClientCost:
    """Measure `seconds` with about `streams` open, each at `stream_rate` tokens/s."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {server_core})  # what is started now stays there
    try:
        with mock_server(tokens_per_message=tokens_per_message, stream_rate=stream_rate) as server:
            _pin({client_core})
            return asyncio.run(
                _run(
                    dialect,
                    server,
                    tokens_per_message=tokens_per_message,
                    streams=streams,
                    life_s=_life_s(answer_tokens, tokens_per_message, stream_rate),
                    answer_tokens=answer_tokens,
                    seconds=seconds,
                )
            )
    finally:
        _pin(all_cores)


def _pin(cores: set[int]) -> None:
    """All threads of this process, gRPC's too: what they do is the client's cost (Linux)."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def _life_s(answer_tokens: int, tokens_per_message: int, stream_rate: float) -> float:
    """From a request to its answer's end; the first message comes at once."""
    return (math.ceil(answer_tokens / tokens_per_message) - 1) * tokens_per_message / stream_rate


async def _run(
    dialect: str,
    server: MockServer,
    *,
    tokens_per_message: int,
    streams: int,
    life_s: float,
    answer_tokens: int,
    seconds: float,
) -> ClientCost:
    transport = _open(dialect, server)
    rate, ramp_s = streams / life_s, life_s + min(life_s, 1.0)
    workload = even_workload(round(rate * (ramp_s + seconds + 1)), rate, answer_tokens)
    prompt = np.arange(PROMPT_TOKENS, dtype=np.int32)
    tally, recorder = Tally(), _Counting()
    client = LoadClient(
        transport,
        Feed(workload),
        lambda work: prompt + work.number % 1000,
        recorder=recorder,
        tally=tally,
    )
    run = asyncio.create_task(client.run())
    await asyncio.sleep(ramp_s)
    sent, num_late = tally.num_sent, len(tally.lateness_s)
    before = _reading(tally, recorder, server)
    least, until_s = tally.num_running, time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        await asyncio.sleep(_SAMPLE_S)
        least = min(least, tally.num_running)
    after = _reading(tally, recorder, server)
    late_s = np.array(tally.lateness_s[num_late:])
    client.stop()
    await run
    await transport.close()
    wall_s, tokens, messages, client_s, server_s = (
        b - a for a, b in zip(before, after, strict=True)
    )
    ttft_s = [row.ttft_s for row in list(tally.rows.values())[sent:] if row.first_s >= 0]
    return ClientCost(
        dialect=dialect,
        tokens_per_message=tokens_per_message,
        streams=least,
        tokens_per_s=tokens / wall_s,
        messages_per_s=messages / wall_s,
        requests_per_s=len(late_s) / wall_s,
        client_load=client_s / wall_s,
        server_load=server_s / wall_s,
        late_p50_s=float(np.percentile(late_s, 50)),
        late_p99_s=float(np.percentile(late_s, 99)),
        ttft_p50_s=float(np.percentile(ttft_s, 50)),
        ttft_p99_s=float(np.percentile(ttft_s, 99)),
        num_failed=tally.num_failed,
    )


def _open(dialect: str, server: MockServer) -> Transport:
    if dialect == "grpc":
        return GrpcTransport(f"127.0.0.1:{server.grpc_port}", Asking())
    return HttpTransport(f"127.0.0.1:{server.http_port}", Asking(model="mock"))


class _Counting(Recorder):
    """A recorder that also counts messages."""

    num_messages = 0

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        self.num_messages += 1
        super().delivered(number, at_s, num_tokens)


def _reading(tally: Tally, recorder: _Counting, server: MockServer) -> tuple[float, ...]:
    """Wall seconds, tokens, messages, and CPU seconds of client and server."""
    server_s = _cpu_s(server.pid)
    wall_s, own_s = time.perf_counter(), time.process_time()
    return wall_s, float(tally.num_tokens), float(recorder.num_messages), own_s, server_s


def _cpu_s(pid: int) -> float:
    """User and system seconds of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
