"""The front end's side of one replica: one Exchange stream, kept alive across engine restarts.

Knows commands, deltas and attempts. Knows no text, no client and no policy.

What is promised when the engine goes. A request whose client has seen tokens ends with NotReady:
to continue it on another engine is a feature of its own (`Submit.resume_tokens`). A request whose
client has seen nothing is kept and submitted again to the next engine, so that a queue outlives its
engine; after MAX_ATTEMPTS engines it ends too, because a request that kills every engine must not
stay. Attempt numbers grow over the whole link, so that no late delta is ever taken for a newer
request's, not even when a client uses a request id twice.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import grpc

from jaxserve.errors import JaxserveError, NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.proto.convert import REASON_TO_PROTO
from jaxserve.request import FinishReason
from jaxserve.server.convert import rejection_from_proto
from jaxserve.server.request_log import log_fault

MAX_ATTEMPTS: Final = 3
RETRY_S: Final = 0.1
DESCRIBE_TIMEOUT_S: Final = 5.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A subchannel shared with the last connection would bring that one's reconnect delay along.
    ("grpc.use_local_subchannel_pool", 1),
)

logger = logging.getLogger(__name__)


@runtime_checkable
class Receiver(Protocol):
    """Where one request's outcome goes. Called on the event loop; must not block."""

    def on_delta(self, delta: pb.RowDelta) -> None: ...

    def try_restart(self) -> bool:
        """Forget what came; False when the client has seen some of it."""
        ...

    def on_failure(self, error: JaxserveError) -> None:
        """The request is over without an answer; nothing follows."""
        ...


@dataclass(slots=True)
class _Flight:
    """One request at the replica. `deadline_s` is on the monotonic clock."""

    submit: pb.Submit
    receiver: Receiver
    deadline_s: float | None
    num_engines: int = 0


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    ready: bool
    in_flight: int
    reconnects: int
    resubmitted: int
    stale_deltas: int


class ReplicaLink:
    """Speaks to the replica at `target`, for example "unix:/run/replica-0.sock".

    `start` begins connecting and goes on until `close`. All methods belong to one event loop.
    """

    def __init__(self, target: str):
        self._target = target
        self._flights: dict[str, _Flight] = {}
        self._attempts = itertools.count(1)
        self._outbox: asyncio.Queue[pb.EngineCommand] | None = None  # None: not connected
        self._stub: pb_grpc.ReplicaStub | None = None
        self._description: pb.DescribeResponse | None = None
        self._listeners: list[Callable[[bool], None]] = []
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._num_connections = self._num_resubmitted = self._num_stale = 0

    # -------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait for the replica to answer. Raises TimeoutError."""
        await asyncio.wait_for(self._ready.wait(), timeout_s)

    async def close(self) -> None:
        """Disconnect for good; what is still in flight ends with NotReady."""
        self._closing = True
        self._fail(list(self._flights), NotReady("the server is shutting down"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def add_listener(self, on_ready: Callable[[bool], None]) -> None:
        """Call `on_ready` with True and False as the replica comes and goes, and once now."""
        self._listeners.append(on_ready)
        on_ready(self.ready)

    @property
    def ready(self) -> bool:
        """Whether the replica takes requests."""
        return self._outbox is not None

    @property
    def description(self) -> pb.DescribeResponse:
        """What the replica last said about itself. Raises NotReady before it first answered."""
        if self._description is None:
            raise NotReady("the model is loading; try again later")
        return self._description

    @property
    def stub(self) -> pb_grpc.ReplicaStub:
        """The replica's other calls. Raises NotReady while it is away."""
        if self._stub is None:
            raise self._away()
        return self._stub

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            ready=self.ready,
            in_flight=len(self._flights),
            reconnects=max(0, self._num_connections - 1),
            resubmitted=self._num_resubmitted,
            stale_deltas=self._num_stale,
        )

    # ---------------------------------------------------------------------------- requests

    def submit(self, submit: pb.Submit, receiver: Receiver, *, deadline_s: float | None) -> None:
        """Hand over a request whose id is not in flight. Raises NotReady while the replica is away.

        The link numbers the attempt and, from `deadline_s` on the monotonic clock, sets the time
        left whenever it sends the request.
        """
        if not self.ready:
            raise self._away()
        flight = _Flight(submit, receiver, deadline_s)
        self._flights[submit.request_id] = flight
        self._launch(flight)

    def abort(
        self,
        request_id: str,
        *,
        sample: int = -1,
        reason: FinishReason,
        keep_tokens: int | None = None,
    ) -> None:
        """Tell the engine that a request, or one sample of it, is over."""
        self._send(
            pb.EngineCommand(
                abort=pb.EngineAbort(
                    request_id=request_id,
                    sample=sample,
                    reason=REASON_TO_PROTO[reason],
                    keep_tokens=keep_tokens,
                )
            )
        )

    def limit_row(self, request_id: str, *, sample: int, max_steps: int) -> None:
        """Let one row run at most `max_steps` steps a slice; 0 lifts the limit."""
        limit = pb.LimitRow(request_id=request_id, sample=sample, max_steps=max_steps)
        self._send(pb.EngineCommand(limit=limit))

    def release(self, request_id: str) -> None:
        """Forget a request that is over; late deltas of it are dropped."""
        self._flights.pop(request_id, None)

    # -------------------------------------------------------------------------- connection

    async def _run(self) -> None:
        while True:
            try:
                await self._serve_connection()
            except grpc.aio.AioRpcError as error:
                # Not worth a line while an engine loads: this repeats every RETRY_S.
                logger.debug("replica %s: %s %s", self._target, error.code(), error.details())
            except Exception:
                log_fault(f"serving replica {self._target}")
            finally:
                self._lost()
            await asyncio.sleep(RETRY_S)

    async def _serve_connection(self) -> None:
        async with grpc.aio.insecure_channel(self._target, options=_OPTIONS) as channel:
            stub = pb_grpc.ReplicaStub(channel)
            self._description = await stub.Describe(
                pb.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
            call = stub.Exchange()
            outbox: asyncio.Queue[pb.EngineCommand] = asyncio.Queue()
            self._connected(stub, outbox)
            writer = asyncio.create_task(_write_all(call, outbox))
            try:
                async for report in call:
                    self._deliver(report)
            finally:
                writer.cancel()
                call.cancel()

    def _connected(
        self, stub: pb_grpc.ReplicaStub, outbox: asyncio.Queue[pb.EngineCommand]
    ) -> None:
        self._stub, self._outbox = stub, outbox
        self._num_connections += 1
        for flight in list(self._flights.values()):
            self._num_resubmitted += 1
            self._launch(flight)
        self._ready.set()
        self._tell()

    def _lost(self) -> None:
        """The engine is gone: end what it had begun, keep what it had not."""
        if self._outbox is None:
            return
        if not self._closing:
            logger.warning(
                "replica %s is gone, %d requests in flight", self._target, len(self._flights)
            )
        self._stub = self._outbox = None
        self._ready.clear()
        self._tell()
        begun, hopeless = [], []
        for request_id, flight in self._flights.items():
            if not flight.receiver.try_restart():
                begun.append(request_id)
            elif flight.num_engines >= MAX_ATTEMPTS:
                hopeless.append(request_id)
        self._fail(
            begun, NotReady("the engine restarted while it answered; send the request again")
        )
        self._fail(
            hopeless, NotReady(f"{MAX_ATTEMPTS} engines ended while the request waited in them")
        )

    def _away(self) -> NotReady:
        state = "restarting" if self._description is not None else "loading"
        return NotReady(f"the engine is {state}; try again later")

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self.ready)

    # ----------------------------------------------------------------------------- traffic

    def _launch(self, flight: _Flight) -> None:
        flight.num_engines += 1
        flight.submit.attempt = next(self._attempts)
        if flight.deadline_s is not None:
            flight.submit.timeout_s = max(0.0, flight.deadline_s - time.monotonic())
        self._send(pb.EngineCommand(submit=flight.submit))

    def _send(self, command: pb.EngineCommand) -> None:
        # Away, there is nothing to tell: a new engine starts without requests and limits.
        if self._outbox is not None:
            self._outbox.put_nowait(command)

    def _deliver(self, report: pb.EngineReport) -> None:
        flights = self._flights
        for delta in report.deltas:
            flight = flights.get(delta.request_id)
            if flight is None or flight.submit.attempt != delta.attempt:
                self._num_stale += 1
                continue
            try:
                flight.receiver.on_delta(delta)
            except Exception:
                # One request's fault must not end the stream that all requests share.
                self.abort(delta.request_id, reason=FinishReason.ERROR)
                self._fail([delta.request_id], log_fault("taking in tokens"))
        for rejected in report.rejected:
            flight = flights.get(rejected.request_id)
            if flight is not None and flight.submit.attempt == rejected.attempt:
                self._fail([rejected.request_id], rejection_from_proto(rejected))

    def _fail(self, request_ids: list[str], error: JaxserveError) -> None:
        for request_id in request_ids:
            self._flights.pop(request_id).receiver.on_failure(error)


async def _write_all(
    call: "grpc.aio.StreamStreamCall", outbox: asyncio.Queue[pb.EngineCommand]
) -> None:
    """Send the commands in order. The reader notices a broken stream; so this one just ends."""
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await outbox.get())
