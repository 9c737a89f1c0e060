"""The replica's gRPC service, on the engine's side: commands in, one report per slice out.

Knows messages, attempts and streams. Knows no text, no client and no device. Everything runs on
one event loop; the dispatch thread beside it wakes the loop once per parsed slice (`deliver`).

There is one front end, and it has one Exchange stream. When a stream ends, its front end is gone,
so its requests are aborted; when another one comes first, it takes over in the same way. What the
core still says about requests of an earlier stream is counted, and dropped.

Ids and attempts. A front end may use an id again as soon as it has aborted the first request, when
the core's last word about that one is still on its way. So an id maps to the attempts that are not
settled, oldest first: deltas are about the oldest, a refusal is about the newest.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import grpc

from jaxserve.clock import Clock
from jaxserve.engine.load_meter import LoadMeter
from jaxserve.errors import JaxserveError, NotBuilt, NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.proto.convert import REASON_FROM_PROTO
from jaxserve.request import Delta, FinishReason, Request
from jaxserve.server.clients import MOST_CLIENTS
from jaxserve.server.convert import (
    client_to_proto,
    rejection_to_proto,
    report_to_proto,
    submit_from_proto,
)
from jaxserve.server.kv_events import kv_event_batches
from jaxserve.server.load import load_to_proto
from jaxserve.server.request_log import log_fault

if TYPE_CHECKING:
    from jaxserve.engine.core import Rejection

DEFAULT_INTERVAL_S: Final = 1.0
LEAST_INTERVAL_S: Final = 0.01
KV_EVENT_PAUSE_S: Final = 0.02

logger = logging.getLogger(__name__)


@runtime_checkable
class Driver(Protocol):
    """What the service needs of `EngineDriver`; its methods return at once."""

    def submit(self, request: Request) -> None: ...

    def abort(
        self,
        request_id: str,
        *,
        sample: int = -1,
        reason: FinishReason = FinishReason.ABORT,
        keep_tokens: int | None = None,
    ) -> None: ...

    def limit_row(self, request_id: str, sample: int, max_steps: int) -> None: ...

    def call(self, function: Callable[[Any], Any]) -> Future[Any]: ...


@dataclass(slots=True)
class _Attempt:
    """One submitted request. `num_open` samples have not ended."""

    number: int
    stream: "_Stream"
    num_open: int


class _Stream:
    """One Exchange stream: the reports that wait to be written.

    The queue needs no bound of its own: what may wait in it is what admitted requests may answer.
    """

    def __init__(self) -> None:
        self.reports: asyncio.Queue[pb.EngineReport | None] = asyncio.Queue()

    def close(self) -> None:
        self.reports.put_nowait(None)


class EngineService(pb_grpc.ReplicaServicer):
    """Serves `driver`. `description` answers Describe; `restarts` counts the engines before."""

    def __init__(
        self, driver: Driver, *, description: pb.DescribeResponse, clock: Clock, restarts: int = 0
    ):
        self._driver = driver
        self._description = description
        self._clock = clock
        self._restarts = restarts
        self._stream: _Stream | None = None
        self._live: dict[str, list[_Attempt]] = {}
        self._draining = False
        self._num_received = 0
        self._started_s = clock.now()
        self._changed = asyncio.Event()
        self._load = LoadMeter(page_size=description.server.page_size)

    # ------------------------------------------------------------------ from the dispatch thread

    def deliver(
        self, dispatch: int, deltas: Sequence[Delta], rejections: "Sequence[Rejection]"
    ) -> None:
        """Hand on what one slice came to. On the loop: the thread calls it threadsafe, once."""
        wanted: list[Delta] = []
        attempts: dict[str, int] = {}
        for delta in deltas:
            attempt = self._live[delta.request_id][0]
            if attempt.stream is self._stream:
                wanted.append(delta)
                attempts[delta.request_id] = attempt.number
            if delta.finish is not None:
                attempt.num_open -= 1
                if not attempt.num_open:
                    self._settle(delta.request_id, 0)
        report = report_to_proto(dispatch, wanted, (), attempts=attempts)
        for rejection in rejections:
            attempt = self._settle(rejection.request_id, -1)
            if attempt.stream is self._stream:
                report.rejected.append(
                    rejection_to_proto(
                        rejection.request_id, rejection.error, attempt=attempt.number
                    )
                )
        if self._stream is not None and (report.deltas or report.rejected):
            self._stream.reports.put_nowait(report)
        self._changed.set()
        self._changed = asyncio.Event()

    def _settle(self, request_id: str, place: int) -> _Attempt:
        attempts = self._live[request_id]
        attempt = attempts.pop(place)
        if not attempts:
            del self._live[request_id]
        return attempt

    # ------------------------------------------------------------------------- from the front end

    async def Exchange(
        self, request_iterator: AsyncIterator[pb.EngineCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.EngineReport]:
        """Take commands and give reports until either side ends the stream."""
        stream = _Stream()
        if self._stream is not None:
            logger.warning("another front end took over")
            self._drop(self._stream)
        self._stream = stream
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while (report := await stream.reports.get()) is not None:
                yield report
        finally:
            reader.cancel()
            if self._stream is stream:
                self._drop(stream)

    async def _read(self, stream: _Stream, commands: AsyncIterator[pb.EngineCommand]) -> None:
        try:
            async for command in commands:
                self._take(stream, command)
        finally:
            stream.close()

    def _drop(self, stream: _Stream) -> None:
        """Its front end is gone: nobody will read what its requests answer."""
        self._stream = None
        stream.close()
        for request_id, attempts in self._live.items():
            if attempts[-1].stream is stream:
                self._driver.abort(request_id)

    def _take(self, stream: _Stream, command: pb.EngineCommand) -> None:
        match command.WhichOneof("command"):
            case "submit":
                self._submit(stream, command.submit)
            case "abort":
                abort = command.abort
                self._driver.abort(
                    abort.request_id,
                    sample=abort.sample,
                    reason=REASON_FROM_PROTO[abort.reason] or FinishReason.ABORT,
                    keep_tokens=abort.keep_tokens if abort.HasField("keep_tokens") else None,
                )
            case "limit":
                limit = command.limit
                self._driver.limit_row(limit.request_id, limit.sample, limit.max_steps)
            case "drain":
                self._drain(command.drain.drain_s)

    def _submit(self, stream: _Stream, submit: pb.Submit) -> None:
        self._num_received += 1
        try:
            if self._draining:
                raise NotReady("the replica is draining; try another or later")
            if submit.resume_tokens:
                raise NotBuilt("Submit.resume_tokens: this build does not resume requests")
            request = submit_from_proto(submit, now_s=self._clock.now())
        except JaxserveError as error:
            self._refuse(stream, submit, error)
        except Exception:
            # One damaged command must not end the stream that all requests share.
            self._refuse(stream, submit, log_fault("reading a submitted request"))
        else:
            attempt = _Attempt(submit.attempt, stream, request.params.n)
            self._live.setdefault(submit.request_id, []).append(attempt)
            self._driver.submit(request)

    def _refuse(self, stream: _Stream, submit: pb.Submit, error: JaxserveError) -> None:
        rejected = rejection_to_proto(submit.request_id, error, attempt=submit.attempt)
        stream.reports.put_nowait(pb.EngineReport(rejected=[rejected]))

    def _drain(self, drain_s: float) -> None:
        """Take nothing more; what is not done after `drain_s` is aborted."""
        self._draining = True
        asyncio.get_running_loop().call_later(drain_s, self._abort_all)

    def _abort_all(self) -> None:
        for request_id in self._live:
            self._driver.abort(request_id)

    # ---------------------------------------------------------------------------------- questions

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeResponse:
        self._description.server.uptime_s = self._clock.now() - self._started_s
        self._description.server.state = "draining" if self._draining else "serving"
        return self._description

    async def GetStatistics(
        self, request: pb.GetStatisticsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReplicaStatistics:
        most = request.most_clients or MOST_CLIENTS
        statistics, meter, clients = await self._ask(
            lambda core: (
                core.statistics(),
                core.meter.values(),
                core.meter.clients(most=most, name=request.client) if request.per_client else (),
            )
        )
        bound = meter.get("service_gap_bound_tokens", 0.0)
        return pb.ReplicaStatistics(
            replica=self._description.replica,
            values={**statistics.values(), **meter},
            clients=[client_to_proto(client, bound=bound) for client in clients],
            engine_restarts=self._restarts,
        )

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.LoadReport]:
        interval_s = request.interval_s if request.HasField("interval_s") else DEFAULT_INTERVAL_S
        while True:
            statistics = await self._ask(lambda core: core.statistics())
            report = self._load.report(
                statistics,
                statistics.pool,
                num_running=statistics.running,
                now_s=self._clock.now(),
                num_received=self._num_received,
            )
            replica = self._description.replica
            yield load_to_proto(report, statistics, replica=replica, draining=self._draining)
            if interval_s <= 0:
                return
            await asyncio.sleep(max(interval_s, LEAST_INTERVAL_S))

    async def SubscribeKvEvents(
        self, request: pb.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.KvEventBatch]:
        after, replica = request.after_sequence or None, self._description.replica
        while True:
            changed = self._changed
            after, batches = await self._ask(
                lambda core, seq=after: kv_event_batches(core.pool.tree, after=seq, replica=replica)
            )
            for batch in batches:
                yield batch
            await changed.wait()
            await asyncio.sleep(KV_EVENT_PAUSE_S)  # several slices' events in one message

    async def _ask(self, question: Callable[[Any], Any]) -> Any:
        """The core's answer, given between two slices."""
        return await asyncio.wrap_future(self._driver.call(question))
