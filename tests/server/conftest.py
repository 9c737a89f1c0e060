"""A real front end before a scripted replica: sockets and protocol are the product's own."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxserve.client import AsyncClient
from jaxserve.config import CacheConfig
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.server.chat_template import ChatTemplate
from jaxserve.server.desk import Desk
from jaxserve.server.frontend import FrontendServer, start_frontend
from jaxserve.server.identity import Gate
from jaxserve.server.link import ReplicaLink
from jaxserve.server.model_text import ModelText
from jaxserve.server.request_log import RequestLog
from jaxserve.server.tokenizer import Tokenizer
from jaxserve.server_config import ServerConfig

EOS = 0
TEXT = (
    "It was the best of times, it was the wörst of times. Ünïcödé: 你好世界 🙂🙃 ROMEO: stop it! "
)


@pytest.fixture(scope="session", autouse=True)
def loop_runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: gRPC's poller is bound to the first it meets."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests on that loop, each for at most 20 s."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    test = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    pyfuncitem.funcargs["loop_runner"].run(asyncio.wait_for(test, 20))
    return True


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of some 320 tokens; id 0 is the special <eos>."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return Tokenizer(backend)


Script = Callable[[pb.Submit, "FakeReplica"], Awaitable[None]]


@dataclass
class FakeReplica(pb_grpc.ReplicaServicer):
    """A replica that does what the test says. `script` runs for every Submit."""

    path: Path
    script: Script | None = None
    vocab_size: int = 400
    max_context: int = 512
    submits: list[pb.Submit] = field(default_factory=list)
    commands: asyncio.Queue[pb.EngineCommand] = field(default_factory=asyncio.Queue)
    num_connections: int = 0
    clients: list[pb.ClientStatistics] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reports: asyncio.Queue[pb.EngineReport] | None = None
        self._unseen: asyncio.Queue[pb.Submit] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def target(self) -> str:
        return f"unix:{self.path}"

    async def start(self) -> None:
        self._server = grpc.aio.server()
        pb_grpc.add_ReplicaServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._server.stop(None)

    async def next_submit(self) -> pb.Submit:
        return await asyncio.wait_for(self._unseen.get(), 5)

    async def next_command(self, kind: str) -> pb.EngineCommand:
        """The next command that is no Submit, which must be of this kind."""
        command = await asyncio.wait_for(self.commands.get(), 5)
        assert command.WhichOneof("command") == kind, command
        return command

    def report(self, *deltas: pb.RowDelta, rejected: Sequence[pb.Rejected] = ()) -> None:
        assert self._reports is not None
        self._reports.put_nowait(pb.EngineReport(dispatch=1, deltas=deltas, rejected=rejected))

    def delta(self, submit: pb.Submit, ids: Sequence[int] = (), **fields: object) -> pb.RowDelta:
        return pb.RowDelta(
            request_id=submit.request_id, attempt=submit.attempt, token_ids=ids, **fields
        )

    def send(self, submit: pb.Submit, ids: Sequence[int] = (), **fields: object) -> None:
        self.report(self.delta(submit, ids, **fields))

    # ---------------------------------------------------------------- the Replica service

    async def Exchange(self, commands, context):
        self.num_connections += 1
        self._reports = asyncio.Queue()
        reader = asyncio.create_task(self._read(commands))
        try:
            while True:
                yield await self._reports.get()
        finally:
            reader.cancel()

    async def _read(self, commands) -> None:
        async for command in commands:
            if command.WhichOneof("command") == "submit":
                self.submits.append(command.submit)
                self._unseen.put_nowait(command.submit)
                if self.script is not None:
                    task = asyncio.create_task(self.script(command.submit, self))
                    self._tasks.add(task)
            else:
                self.commands.put_nowait(command)

    async def Describe(self, request, context):
        model = pb.GetModelInfoResponse(
            model="tiny", vocab_size=self.vocab_size, max_context=self.max_context, num_layers=2
        )
        server = pb.GetServerInfoResponse(platform="cpu", page_size=8, kv_pages=64)
        return pb.DescribeResponse(replica="replica-0", model=model, server=server, max_samples=4)

    async def GetStatistics(self, request, context):
        asked = [one for one in self.clients if request.client in ("", one.client)]
        return pb.ReplicaStatistics(
            replica="replica-0",
            values={"running": 3.0},
            engine_restarts=2,
            clients=asked if request.per_client else (),
        )

    async def GetLoads(self, request, context):
        for received in range(3):
            yield pb.LoadReport(replica="replica-0", dispatches_received=received)

    async def SubscribeKvEvents(self, request, context):
        if request.after_sequence > 100:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "after_sequence: too new")
        stored = pb.KvStored(keys=[b"k" * 16])
        events = [pb.KvEvent(sequence=request.after_sequence + 1, stored=stored)]
        yield pb.KvEventBatch(replica="replica-0", first_sequence=1, events=events)


@dataclass
class Reply:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict | str]:
        """Of a stream: JSON, and "[DONE]" as it is."""
        parts = [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]
        return [part if part == "[DONE]" else json.loads(part) for part in parts]


class HttpConnection:
    """HTTP/1.1 by hand, so that a test sees what is on the wire and can cut it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        status_line, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        return int(status_line.split()[1]), headers

    async def chunk(self) -> bytes:
        """One part of a chunked body; empty at its end."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def reply(self) -> Reply:
        status, headers = await self.head()
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = b""
            while part := await self.chunk():
                body += part
        return Reply(status, headers, body)


@dataclass
class Served:
    """What a test holds: the server, its replica, its log, and a client."""

    frontend: FrontendServer
    desk: Desk
    replica: FakeReplica
    link: ReplicaLink
    client: AsyncClient
    channel: grpc.aio.Channel
    log_path: Path

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.frontend.port}"

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[HttpConnection]:
        assert self.frontend.http_port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.frontend.http_port)
        try:
            yield HttpConnection(reader, writer)
        finally:
            writer.close()

    async def get(self, path: str, **headers: str) -> Reply:
        async with self.connected() as connection:
            await connection.send("GET", path, **headers)
            return await connection.reply()

    async def post(self, path: str, body: object, **headers: str) -> Reply:
        """`body` is sent as JSON, bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.connected() as connection:
            await connection.send("POST", path, data, **headers)
            return await connection.reply()

    def log_lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]


@pytest.fixture
def serve(tmp_path: Path, tokenizer: Tokenizer):
    """`async with serve(...) as served`: a front end and its replica, ready."""

    @asynccontextmanager
    async def serving(
        *,
        script: Script | None = None,
        with_tokenizer: bool = True,
        cache: CacheConfig | None = None,
        max_message_mb: float = 0.25,
        http: bool = False,
        keys: Path | None = None,
        template: str | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
        client_metrics: str = "auto",
    ) -> AsyncIterator[Served]:
        log_path = tmp_path / "requests.jsonl"
        replica = FakeReplica(tmp_path / "replica.sock", script)
        link = ReplicaLink(replica.target)
        async with AsyncExitStack() as stack:
            await replica.start()
            stack.push_async_callback(replica.stop)
            link.start()
            stack.push_async_callback(link.close)
            gate = Gate(keys)
            desk = Desk(
                link,
                ModelText(
                    tokenizer=tokenizer if with_tokenizer else None,
                    template=None if template is None else ChatTemplate(template, {}),
                    sampling_defaults=sampling_defaults or {},
                ),
                cache=(cache or CacheConfig()).resolved(has_keys=gate.has_keys),
                gate=gate,
                request_log=RequestLog(stack.enter_context(log_path.open("a"))),
            )
            config = ServerConfig(
                port=0,
                http_port=0 if http else -1,
                max_message_mb=max_message_mb,
                api_keys="" if keys is None else str(keys),
                client_metrics=client_metrics,
            )
            frontend = await start_frontend(config, desk, configuration={"model": "tiny"})
            stack.push_async_callback(frontend.stop)
            await link.wait_ready(5)
            target = f"127.0.0.1:{frontend.port}"
            client = await stack.enter_async_context(AsyncClient(target))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            yield Served(frontend, desk, replica, link, client, channel, log_path)

    return serving


def answer_with(ids: Sequence[int], *, slice_tokens: int = 4, **last: object) -> Script:
    """A script that answers every sample with `ids`, a slice at a time, ending by LENGTH."""

    async def script(submit: pb.Submit, replica: FakeReplica) -> None:
        for start in range(0, len(ids), slice_tokens):
            part = ids[start : start + slice_tokens]
            end: dict = {}
            if start + slice_tokens >= len(ids):
                end = {"finish": pb.FINISH_REASON_LENGTH, **last}
            replica.report(
                *(
                    replica.delta(submit, part, sample=sample, **end)
                    for sample in range(submit.sampling.n)
                )
            )
            await asyncio.sleep(0)

    return script


@pytest.fixture
def answer() -> Callable[..., Script]:
    return answer_with


def prompt_of(submit: pb.Submit) -> list[int]:
    return np.frombuffer(submit.prompt, "<i4").tolist()
