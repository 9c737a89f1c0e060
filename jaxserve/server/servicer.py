"""The calls of jaxserve.v1.Jaxserve, one method each. Knows no socket: `frontend.py` binds them."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn, Protocol, runtime_checkable

import grpc

from jaxserve import __version__
from jaxserve.config import CacheConfig
from jaxserve.errors import BadRequest, JaxserveError, NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.status import from_status
from jaxserve.request import FinishReason
from jaxserve.server.answer import Answer
from jaxserve.server.convert import submit_to_proto
from jaxserve.server.detokenize import CONTEXT_TOKENS
from jaxserve.server.intake import MAX_NAME_CHARS, Intake
from jaxserve.server.link import ReplicaLink
from jaxserve.server.request_log import RequestLog, RequestRecord
from jaxserve.server.tokenizer import Tokenizer


@runtime_checkable
class Context(Protocol):
    """What calls use of gRPC's context, which does not derive from the class that gRPC names."""

    def peer(self) -> str: ...

    def invocation_metadata(self) -> Sequence[tuple[str, Any]] | None: ...

    def time_remaining(self) -> float | None: ...

    async def write(self, message: Any) -> None: ...

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: Any
    ) -> NoReturn: ...


class JaxserveServicer:
    """Serves one model of one replica. Every method may raise JaxserveError; the binding answers.

    `configuration` are the effective flags, for GetServerInfo.
    """

    def __init__(
        self,
        link: ReplicaLink,
        tokenizer: Tokenizer | None,
        cache: CacheConfig,
        *,
        configuration: Mapping[str, str],
        request_log: RequestLog,
    ):
        self.link = link
        self.draining = False
        self.num_requests = self.num_refused = 0
        self._tokenizer = tokenizer
        self._cache = cache
        self._configuration = configuration
        self._log = request_log
        self._started_at_s = time.monotonic()
        self._live: dict[str, Answer] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    # ------------------------------------------------------------------------- generation

    async def generate(self, message: pb.GenerateRequest, context: Context) -> None:
        async with self._answering(message, context, once=False) as answer:
            while messages := await answer.next_messages():
                for response in messages:
                    await context.write(response)

    async def generate_once(
        self, message: pb.GenerateRequest, context: Context
    ) -> pb.GenerateOnceResponse:
        async with self._answering(message, context, once=True) as answer:
            parts = await answer.next_messages()
            await answer.next_messages()  # raises where the end was an error
            response = pb.GenerateOnceResponse(
                request_id=answer.request.request_id, usage=answer.usage
            )
            for part in parts:
                response.samples.add(
                    sample=part.sample,
                    text=part.text,
                    token_ids=part.token_ids,
                    logprobs=part.logprobs,
                    finish=part.finish,
                )
                response.prompt_logprobs.extend(part.prompt_logprobs)
            return response

    async def abort(self, message: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        response = pb.AbortResponse()
        for request_id in message.request_ids:
            answer = self._live.get(request_id)
            if answer is None or answer.done:
                response.unknown.append(request_id)
            else:
                self.link.abort(request_id, reason=FinishReason.ABORT)
                self.link.release(request_id)
                answer.end(FinishReason.ABORT)
                response.aborted.append(request_id)
        return response

    # -------------------------------------------------------------------------- tokenizer

    async def tokenize(self, message: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        intake = self._intake(message.model)
        special = message.add_special_tokens if message.HasField("add_special_tokens") else True
        ids = await intake.encode(message.text, add_special_tokens=special)
        return pb.TokenizeResponse(token_ids=ids.tolist())

    async def detokenize(
        self, message: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        intake = self._intake(message.model)
        tokenizer = intake.need_tokenizer("token_ids", f"{len(message.token_ids)} ids")
        ids, vocab_size = list(message.token_ids), intake.limits.vocab_size
        for place, token in enumerate(ids):
            if token >= vocab_size:
                raise BadRequest(f"token_ids[{place}]", token, f"0 to {vocab_size - 1}")
        skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=tokenizer.decode(ids, skip_special_tokens=skip))

    # -------------------------------------------------------------------------- inventory

    async def list_models(
        self, message: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self.link.description.model.model])

    async def get_model_info(
        self, message: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        info = pb.GetModelInfoResponse()
        info.CopyFrom(self._intake(message.model).described.model)
        info.has_tokenizer = self._tokenizer is not None
        return info

    async def get_server_info(
        self, message: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        info = pb.GetServerInfoResponse()
        if self.link.ready:
            info.CopyFrom(self.link.description.server)
        info.version = __version__
        info.schema = pb.DESCRIPTOR.package
        info.configuration.update(self._configuration)
        info.uptime_s = time.monotonic() - self._started_at_s
        serving = "serving" if self.link.ready else "loading"
        info.state = "draining" if self.draining else serving
        return info

    # ----------------------------------------------------------------- from the replica

    async def get_statistics(
        self, message: pb.GetStatisticsRequest, context: Context
    ) -> pb.GetStatisticsResponse:
        with _replica_errors():
            replica = await self.link.stub.GetStatistics(message)
        return pb.GetStatisticsResponse(replicas=[replica])

    async def get_loads(self, message: pb.GetLoadsRequest, context: Context) -> None:
        interval_s = message.interval_s
        if not (math.isfinite(interval_s) and interval_s >= 0):
            raise BadRequest("interval_s", interval_s, "0 (one report only) or more seconds")
        with _replica_errors():
            async for report in self.link.stub.GetLoads(message):
                report.draining = report.draining or self.draining
                await context.write(report)

    async def subscribe_kv_events(
        self, message: pb.SubscribeKvEventsRequest, context: Context
    ) -> None:
        name = self.link.description.replica
        if message.replica not in ("", name):
            raise BadRequest("replica", message.replica, f"{name!r} or none")
        with _replica_errors():
            async for batch in self.link.stub.SubscribeKvEvents(message):
                await context.write(batch)

    # --------------------------------------------------------------------------- draining

    @property
    def num_live(self) -> int:
        """Requests that are being answered."""
        return len(self._live)

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    def end_rest(self, error: JaxserveError) -> None:
        """End every request that is still being answered."""
        for answer in list(self._live.values()):
            answer.on_failure(error)

    # ------------------------------------------------------------------ a request's frame

    def _intake(self, model: str = "") -> Intake:
        intake = Intake(self.link.description, self._tokenizer, self._cache)
        intake.check_model(model)
        return intake

    @asynccontextmanager
    async def _answering(
        self, message: pb.GenerateRequest, context: Context, *, once: bool
    ) -> AsyncIterator[Answer]:
        """A request from intake to its log line; whatever way it ends, the engine is told."""
        arrived_s = time.monotonic()
        record = RequestRecord(
            request_id=message.request_id[:MAX_NAME_CHARS],  # not judged yet
            method="GenerateOnce" if once else "Generate",
            model=message.model[:MAX_NAME_CHARS],
            client=message.client[:MAX_NAME_CHARS],
            peer=context.peer(),
        )
        answer: Answer | None = None
        self.num_requests += 1
        try:
            answer = await self._admit(message, context, once=once)
            yield answer
        except asyncio.CancelledError:
            record.code = "DEADLINE_EXCEEDED" if _is_late(context) else "CANCELLED"
            raise
        except JaxserveError as error:
            record.code, record.error = error.grpc_code, str(error)
            self.num_refused += answer is None
            raise
        except Exception as error:
            record.code, record.error = "INTERNAL", type(error).__name__
            raise
        finally:
            if answer is not None:
                self._close(answer, late=_is_late(context))
                _describe(answer, record, arrived_s)
            record.total_s = round(time.monotonic() - arrived_s, 6)
            self._log.write(record)

    async def _admit(self, message: pb.GenerateRequest, context: Context, *, once: bool) -> Answer:
        if self.draining:
            raise NotReady("the server is draining; send the request elsewhere")
        intake = self._intake()
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        request = await intake.make_request(message, metadata)
        if request.request_id in self._live:
            raise BadRequest("request_id", request.request_id, "an id that no live request has")
        tokenizer = intake.tokenizer if intake.wants_text(message) else None
        context_ids = request.prompt[-CONTEXT_TOKENS:].tolist()
        answer = Answer(
            request,
            self.link,
            make_detokenizer=(
                None if tokenizer is None else lambda: tokenizer.detokenizer(context_ids)
            ),
            token_text=str if tokenizer is None else tokenizer.token_text,
            once=once,
        )
        self.link.submit(submit_to_proto(request), answer, deadline_s=deadline_s)
        self._live[request.request_id] = answer
        self._idle.clear()
        return answer

    def _close(self, answer: Answer, *, late: bool) -> None:
        request_id = answer.request.request_id
        del self._live[request_id]
        if not self._live:
            self._idle.set()
        if not answer.complete:
            reason = FinishReason.DEADLINE if late else FinishReason.ABORT
            self.link.abort(request_id, reason=reason)
        self.link.release(request_id)


def _is_late(context: Context) -> bool:
    remaining_s = context.time_remaining()
    return remaining_s is not None and remaining_s <= 0


def _describe(answer: Answer, record: RequestRecord, arrived_s: float) -> None:
    usage = answer.usage
    record.request_id = answer.request.request_id
    record.client = answer.request.client
    record.samples = answer.request.params.n
    record.prompt_tokens = usage.prompt_tokens
    record.cached_tokens = usage.cached_tokens
    record.completion_tokens = usage.completion_tokens
    record.finish = answer.finish_reasons
    if answer.first_token_at_s is not None:
        record.first_token_s = round(answer.first_token_at_s - arrived_s, 6)


@contextmanager
def _replica_errors() -> Iterator[None]:
    """Answer with the replica's own error where a forwarded call fails."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
        raise from_status(error.code().name, error.details() or "", metadata) from error
