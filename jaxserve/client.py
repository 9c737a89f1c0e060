"""A small client: one class for plain code, one for asyncio, the same methods on both.

    with Client("127.0.0.1:8470") as client:
        for chunk in client.generate("ROMEO:", sampling=SamplingParams(max_tokens=64)):
            print(chunk.text, end="", flush=True)

Prompts are texts or token ids. `sampling` is a whole `SamplingParams`, or a mapping of some of its
fields: the others take the model's own defaults, where it has any. `timeout_s` is the deadline of
the call, which the server keeps too. Errors are the classes of `jaxserve.errors`. Leaving a stream
before its end cancels the request. Knows the wire; needs no JAX.
"""

from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.client_results import (
    Aborted,
    Chunk,
    ClientStatistics,
    Completion,
    Finish,
    ModelInfo,
    ReplicaStatistics,
    Sample,
    ServedTokens,
    ServerInfo,
    Usage,
    chunk_from_proto,
    completion_from_proto,
    model_info_from_proto,
    server_info_from_proto,
    statistics_from_proto,
)
from jaxserve.errors import BadRequest
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.proto.convert import sampling_to_proto
from jaxserve.proto.status import from_status
from jaxserve.request import FinishReason, SamplingParams, TokenLogprob

__all__ = [
    "Aborted",
    "AsyncClient",
    "Chunk",
    "Client",
    "ClientStatistics",
    "Completion",
    "Finish",
    "FinishReason",
    "ModelInfo",
    "ReplicaStatistics",
    "Sample",
    "SamplingParams",
    "ServedTokens",
    "ServerInfo",
    "TokenLogprob",
    "Usage",
]

Sampling = SamplingParams | Mapping[str, Any]

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


class Client:
    """A blocking client of the server at `target`, "host:port"; may be used from many threads."""

    def __init__(self, target: str, *, client: str = "", api_key: str = ""):
        """`client` is the party that requests are made for, unless `api_key` says it."""
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._stub = pb_grpc.JaxserveStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._client = client
        self._metadata = _metadata(api_key)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Generator[Chunk, None, None]:
        """Stream an answer. `fields` are the other fields of `GenerateRequest`, such as `model`,
        `request_id`, `priority` (smaller is more urgent), `detokenize` and `cache_salt`."""
        request = _request(prompt, sampling, self._client, fields)
        with _errors():
            call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
            try:
                for message in call:
                    yield chunk_from_proto(message)
            finally:
                call.cancel()

    def generate_once(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Completion:
        """The whole answer at once; arguments as for `generate`."""
        request = _request(prompt, sampling, self._client, fields)
        with _errors():
            return completion_from_proto(
                self._stub.GenerateOnce(request, timeout=timeout_s, metadata=self._metadata)
            )

    def abort(self, *request_ids: str) -> Aborted:
        """End requests by id; their streams end with FinishReason.ABORT."""
        with _errors():
            reply = self._stub.Abort(
                pb.AbortRequest(request_ids=request_ids), metadata=self._metadata
            )
        return Aborted(tuple(reply.aborted), tuple(reply.unknown))

    def tokenize(self, text: str, *, model: str = "", add_special_tokens: bool = True) -> list[int]:
        with _errors():
            request = pb.TokenizeRequest(
                model=model, text=text, add_special_tokens=add_special_tokens
            )
            return list(self._stub.Tokenize(request, metadata=self._metadata).token_ids)

    def detokenize(
        self, token_ids: Iterable[int], *, model: str = "", skip_special_tokens: bool = True
    ) -> str:
        with _errors():
            request = pb.DetokenizeRequest(
                model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
            )
            return self._stub.Detokenize(request, metadata=self._metadata).text

    def models(self) -> list[str]:
        with _errors():
            return list(
                self._stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata).models
            )

    def model_info(self, model: str = "") -> ModelInfo:
        with _errors():
            return model_info_from_proto(
                self._stub.GetModelInfo(
                    pb.GetModelInfoRequest(model=model), metadata=self._metadata
                )
            )

    def server_info(self) -> ServerInfo:
        with _errors():
            return server_info_from_proto(
                self._stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=self._metadata)
            )

    def statistics(self, *, per_client: bool = False) -> list[ReplicaStatistics]:
        """Numbers of every replica; with `per_client` also of every client that may be shown."""
        request = pb.GetStatisticsRequest(per_client=per_client)
        with _errors():
            return statistics_from_proto(self._stub.GetStatistics(request, metadata=self._metadata))

    def is_serving(self) -> bool:
        """What the server's health check says."""
        with _errors():
            return _is_serving(self._health.Check(health_pb2.HealthCheckRequest()))


class AsyncClient:
    """The client for asyncio; belongs to the event loop it was made on."""

    def __init__(self, target: str, *, client: str = "", api_key: str = ""):
        """`client` is the party that requests are made for, unless `api_key` says it."""
        self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._stub = pb_grpc.JaxserveStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._client = client
        self._metadata = _metadata(api_key)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream an answer; arguments as for `Client.generate`. To leave the stream early and have
        the request cancelled at once, close it (`contextlib.aclosing`) or cancel the task."""
        request = _request(prompt, sampling, self._client, fields)
        with _errors():
            call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
            try:
                async for message in call:
                    yield chunk_from_proto(message)
            finally:
                call.cancel()

    async def generate_once(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Completion:
        """The whole answer at once; arguments as for `Client.generate`."""
        request = _request(prompt, sampling, self._client, fields)
        with _errors():
            return completion_from_proto(
                await self._stub.GenerateOnce(request, timeout=timeout_s, metadata=self._metadata)
            )

    async def abort(self, *request_ids: str) -> Aborted:
        """End requests by id; their streams end with FinishReason.ABORT."""
        with _errors():
            reply = await self._stub.Abort(
                pb.AbortRequest(request_ids=request_ids), metadata=self._metadata
            )
        return Aborted(tuple(reply.aborted), tuple(reply.unknown))

    async def tokenize(
        self, text: str, *, model: str = "", add_special_tokens: bool = True
    ) -> list[int]:
        with _errors():
            request = pb.TokenizeRequest(
                model=model, text=text, add_special_tokens=add_special_tokens
            )
            return list((await self._stub.Tokenize(request, metadata=self._metadata)).token_ids)

    async def detokenize(
        self, token_ids: Iterable[int], *, model: str = "", skip_special_tokens: bool = True
    ) -> str:
        with _errors():
            request = pb.DetokenizeRequest(
                model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
            )
            return (await self._stub.Detokenize(request, metadata=self._metadata)).text

    async def models(self) -> list[str]:
        with _errors():
            return list(
                (
                    await self._stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata)
                ).models
            )

    async def model_info(self, model: str = "") -> ModelInfo:
        with _errors():
            return model_info_from_proto(
                await self._stub.GetModelInfo(
                    pb.GetModelInfoRequest(model=model), metadata=self._metadata
                )
            )

    async def server_info(self) -> ServerInfo:
        with _errors():
            return server_info_from_proto(
                await self._stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=self._metadata)
            )

    async def statistics(self, *, per_client: bool = False) -> list[ReplicaStatistics]:
        """Numbers of every replica; with `per_client` also of every client that may be shown."""
        request = pb.GetStatisticsRequest(per_client=per_client)
        with _errors():
            return statistics_from_proto(
                await self._stub.GetStatistics(request, metadata=self._metadata)
            )

    async def is_serving(self) -> bool:
        """What the server's health check says."""
        with _errors():
            return _is_serving(await self._health.Check(health_pb2.HealthCheckRequest()))


def _metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _request(
    prompt: str | Sequence[int],
    sampling: Sampling | None,
    client: str,
    fields: dict[str, Any],
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(**{"client": client, **fields})
    try:
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(prompt)
    except (ValueError, TypeError) as error:
        raise BadRequest("prompt", prompt, f"text or token ids ({error})") from None
    if sampling is not None:
        request.sampling.CopyFrom(sampling_to_proto(sampling))
    return request


def _is_serving(reply: health_pb2.HealthCheckResponse) -> bool:
    return reply.status == health_pb2.HealthCheckResponse.SERVING


@contextmanager
def _errors() -> Iterator[None]:
    """Turn a call's status into the error it stands for."""
    try:
        yield
    except grpc.RpcError as error:
        call: Any = error  # every RpcError a call raises is that call, which the type does not say
        metadata = {str(key): str(value) for key, value in call.trailing_metadata() or ()}
        raise from_status(call.code().name, call.details() or "", metadata) from error
