"""The load client's gRPC: generated stubs over a few channels, token ids only.

One channel is one HTTP/2 connection; servers and proxies may limit the streams of each, so that
requests take turns over several. Knows no workload beyond one request and keeps no time.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio as grpc_aio
import numpy as np

from jaxserve.bench.transport import (
    REFUSED,
    Asking,
    Ending,
    OnTokens,
    ServerFacts,
    can_connect,
    split_address,
)
from jaxserve.errors import ConfigError
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.workload.work import Work

ASK_S: Final = 10.0
"""Longest wait for what the server says of itself."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # else equal channels share one connection
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_EOF: Final[Any] = grpc_aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_DEADLINE: "deadline",
    pb.FINISH_REASON_ERROR: "error",
}
_CODES: Final[Mapping[grpc.StatusCode, str]] = {
    grpc.StatusCode.CANCELLED: "abort",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.RESOURCE_EXHAUSTED: REFUSED,
    grpc.StatusCode.INVALID_ARGUMENT: REFUSED,
    grpc.StatusCode.NOT_FOUND: REFUSED,
    grpc.StatusCode.UNAUTHENTICATED: REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: REFUSED,
}
"""What a status makes of a request; all others are errors."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    request: pb.GenerateRequest
    metadata: tuple[tuple[str, str], ...]


class GrpcTransport:
    """jaxserve.v1 at `target`, "host:port", over `connections` channels."""

    counted = "token ids of each message"

    def __init__(self, target: str, asking: Asking, *, connections: int = 4):
        """Raises ConfigError for an address that is none."""
        self._address = split_address(target)
        self._target, self._asking = target, asking
        self._channels = [
            grpc.aio.insecure_channel(target, options=_OPTIONS) for _ in range(connections)
        ]
        self._stubs = [pb_grpc.JaxserveStub(channel) for channel in self._channels]
        self._turn = 0

    async def facts(self) -> ServerFacts:
        metadata, ask = _metadata(self._asking.api_key), self._stubs[0]
        try:
            model = await ask.GetModelInfo(
                pb.GetModelInfoRequest(model=self._asking.model), timeout=ASK_S, metadata=metadata
            )
            server = await ask.GetServerInfo(
                pb.GetServerInfoRequest(), timeout=ASK_S, metadata=metadata
            )
        except grpc.RpcError as error:
            call: Any = error  # every RpcError a call raises is that call
            said = f"{call.code().name}: {call.details()}"
            raise ConfigError(
                f"server: {self._target} does not answer over gRPC ({said}); start one with"
                " `jaxserve serve`, or name another with --server or --api"
            ) from None
        described = {
            "server": f"jaxserve {server.version}",
            "device": f"{server.num_devices} x {server.device_kind or server.platform}",
        }
        return ServerFacts(
            model=model.model,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            num_pages=server.kv_pages,
            num_devices=server.num_devices or None,  # a scripted engine has none
            dispatch_s=server.slice_dispatch_s or None,  # others measure none
            configuration=dict(sorted(server.configuration.items())),
            described=described,
        )

    def prepare(self, work: Work, token_ids: np.ndarray) -> _Prepared:
        asking = self._asking
        request = pb.GenerateRequest(
            model=asking.model,
            sampling=pb.SamplingParams(
                max_tokens=work.max_tokens,
                ignore_eos=asking.ignore_eos,
                temperature=asking.temperature,
                seed=work.number,
            ),
            priority=work.priority,
            client=work.client if asking.name_clients else "",
            session=work.session or "",
            detokenize=False,
        )
        request.token_ids.ids.extend(token_ids.tolist())
        return _Prepared(request, _metadata(asking.key(work.client)))

    async def send(
        self, prepared: _Prepared, timeout_s: float | None, on_tokens: OnTokens
    ) -> Ending:
        self._turn = (self._turn + 1) % len(self._stubs)
        call: Any = self._stubs[self._turn].Generate(
            prepared.request, timeout=timeout_s, metadata=prepared.metadata
        )
        last = None
        try:
            while (message := await call.read()) is not _EOF:
                if message.token_ids:
                    on_tokens(time.perf_counter(), len(message.token_ids))
                last = message
        except grpc.aio.AioRpcError as error:
            return _failed(error)
        finally:
            call.cancel()
        if last is None or not last.HasField("finish"):
            return Ending(reason="error", fault="cut short", message="no finish in the last part")
        reason, fault = _REASONS.get(last.finish.reason, "error"), ""
        if reason == "error":
            fault = "finish ERROR"
        return Ending(
            reason=reason,
            cached_tokens=last.usage.cached_tokens,
            prompt_tokens=last.usage.prompt_tokens,
            fault=fault,
            message=last.finish.message,
        )

    async def alive(self) -> bool:
        return await can_connect(*self._address)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def _failed(error: grpc.aio.AioRpcError) -> Ending:
    code = error.code()
    reason = _CODES.get(code, "error")
    return Ending(
        reason=reason,
        fault="" if reason == "abort" else code.name,
        message=error.details() or "",
        lost=code is grpc.StatusCode.UNAVAILABLE,
    )


def _metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
