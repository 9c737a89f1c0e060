"""The calls of jaxserve.v1.Jaxserve, one method each. Knows no socket: `frontend.py` binds them."""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, NoReturn, Protocol, runtime_checkable

import grpc
import numpy as np

from jaxserve import __version__
from jaxserve.errors import BadRequest
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.convert import given_sampling
from jaxserve.proto.status import from_status
from jaxserve.server.answer import Answer
from jaxserve.server.clients import ClientCounts
from jaxserve.server.desk import Desk
from jaxserve.server.identity import Caller
from jaxserve.server.intake import Ask


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

    def __init__(self, desk: Desk, *, configuration: Mapping[str, str]):
        self._desk = desk
        self._configuration = configuration
        self._started_at_s = time.monotonic()

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
        aborted, unknown = self._desk.abort(message.request_ids, self._caller(context))
        return pb.AbortResponse(aborted=aborted, unknown=unknown)

    # -------------------------------------------------------------------------- tokenizer

    async def tokenize(self, message: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        self._caller(context)
        intake = self._desk.intake(message.model)
        special = message.add_special_tokens if message.HasField("add_special_tokens") else True
        ids = await intake.encode(message.text, add_special_tokens=special)
        return pb.TokenizeResponse(token_ids=ids.tolist())

    async def detokenize(
        self, message: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        self._caller(context)
        intake = self._desk.intake(message.model)
        tokenizer = intake.text.need_tokenizer("token_ids", f"{len(message.token_ids)} ids")
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
        self._caller(context)
        return pb.ListModelsResponse(models=[self._desk.intake().model])

    async def get_model_info(
        self, message: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        self._caller(context)
        intake = self._desk.intake(message.model)
        info = pb.GetModelInfoResponse()
        info.CopyFrom(intake.described.model)
        info.has_tokenizer = intake.text.tokenizer is not None
        info.has_chat_template = intake.text.template is not None
        info.sampling_defaults.update(intake.text.sampling_defaults)
        return info

    async def get_server_info(
        self, message: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        self._caller(context)
        link = self._desk.link
        info = pb.GetServerInfoResponse()
        if link.ready:
            info.CopyFrom(link.description.server)
        info.version = __version__
        info.schema = pb.DESCRIPTOR.package
        info.configuration.update(self._configuration)
        info.uptime_s = time.monotonic() - self._started_at_s
        serving = "serving" if link.ready else "loading"
        info.state = "draining" if self._desk.draining else serving
        return info

    # ----------------------------------------------------------------- from the replica

    async def get_statistics(
        self, message: pb.GetStatisticsRequest, context: Context
    ) -> pb.GetStatisticsResponse:
        caller = self._caller(context)
        name = caller.client if self._desk.gate.has_keys else message.client
        with _replica_errors():
            replica = await self._desk.link.stub.GetStatistics(
                pb.GetStatisticsRequest(
                    per_client=message.per_client, client=name, most_clients=message.most_clients
                )
            )
        if message.per_client:
            everyone = self._desk.ledger.all()
            mine = [self._desk.ledger.of(caller)] if self._desk.gate.has_keys else everyone
            _add_counts(replica, [counts for counts in mine if name in ("", counts.client)])
            if message.most_clients:
                del replica.clients[message.most_clients :]
        return pb.GetStatisticsResponse(replicas=[replica])

    async def get_loads(self, message: pb.GetLoadsRequest, context: Context) -> None:
        self._caller(context)
        interval_s = message.interval_s
        if not (math.isfinite(interval_s) and interval_s >= 0):
            raise BadRequest("interval_s", interval_s, "0 (one report only) or more seconds")
        with _replica_errors():
            async for report in self._desk.link.stub.GetLoads(message):
                report.draining = report.draining or self._desk.draining
                await context.write(report)

    async def subscribe_kv_events(
        self, message: pb.SubscribeKvEventsRequest, context: Context
    ) -> None:
        self._caller(context)
        link = self._desk.link
        name = link.description.replica
        if message.replica not in ("", name):
            raise BadRequest("replica", message.replica, f"{name!r} or none")
        with _replica_errors():
            async for batch in link.stub.SubscribeKvEvents(message):
                await context.write(batch)

    # --------------------------------------------------------------------------- the caller

    def _caller(self, context: Context) -> Caller:
        """Raises Unauthenticated where keys are in use and the call has none that is known."""
        return self._desk.gate.identify(_headers(context))

    def _answering(
        self, message: pb.GenerateRequest, context: Context, *, once: bool
    ) -> AbstractAsyncContextManager[Answer]:
        remaining_s = context.time_remaining()
        return self._desk.answering(
            _read_ask(message),
            _headers(context),
            method="GenerateOnce" if once else "Generate",
            peer=context.peer(),
            once=once,
            deadline_s=None if remaining_s is None else time.monotonic() + remaining_s,
        )


def _headers(context: Context) -> dict[str, str]:
    return {str(key): str(value) for key, value in context.invocation_metadata() or ()}


def _read_ask(message: pb.GenerateRequest) -> Ask:
    prompt: str | np.ndarray | None = None
    match message.WhichOneof("prompt"):
        case "token_ids":
            prompt = np.asarray(message.token_ids.ids, np.int64)
        case "text":
            prompt = message.text
    return Ask(
        prompt=prompt,
        sampling=given_sampling(message.sampling),
        model=message.model,
        request_id=message.request_id,
        client=message.client,
        priority=message.priority,
        detokenize=message.detokenize if message.HasField("detokenize") else None,
        cache_salt=message.cache_salt,
        group=message.group,
    )


def _add_counts(replica: pb.ReplicaStatistics, counts: Iterable[ClientCounts]) -> None:
    """Put the front end's counts beside what the engine says of the same clients."""
    served = {client.client: client for client in replica.clients}
    for each in counts:
        message = pb.ClientStatistics(**dataclasses.asdict(each))
        if each.client in served:
            served[each.client].MergeFrom(message)
        else:
            replica.clients.append(message)


@contextmanager
def _replica_errors() -> Iterator[None]:
    """Answer with the replica's own error where a forwarded call fails."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
        raise from_status(error.code().name, error.details() or "", metadata) from error
