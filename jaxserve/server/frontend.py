"""The front end's gRPC server: binds calls to a port, names every error, drains and stops.

Knows sockets and statuses. What the calls do is in `servicer.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.config import CacheConfig
from jaxserve.errors import ConfigError, JaxserveError, NotBuilt, NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.status import to_status
from jaxserve.server import health
from jaxserve.server.link import LinkStatistics, ReplicaLink
from jaxserve.server.request_log import RequestLog, log_fault
from jaxserve.server.servicer import Context, JaxserveServicer
from jaxserve.server.tokenizer import Tokenizer
from jaxserve.server.wire import parse
from jaxserve.server_config import ServerConfig

_JAXSERVE: Final = pb.DESCRIPTOR.services_by_name["Jaxserve"]
_ADMIN: Final = pb.DESCRIPTOR.services_by_name["Admin"]
TRANSPORT_FACTOR: Final = 4
"""gRPC drops messages over its own limit with RESOURCE_EXHAUSTED, before we see them; ours, which
answers INVALID_ARGUMENT and says what is allowed, is this much lower."""


@dataclass(frozen=True, slots=True)
class FrontendStatistics:
    live: int
    requests: int
    refused: int
    draining: bool
    link: LinkStatistics


class FrontendServer:
    """A listening front end. Made by `start_frontend`; all methods belong to one event loop."""

    def __init__(
        self, server: grpc.aio.Server, servicer: JaxserveServicer, health_: health.Health, port: int
    ):
        self.port = port
        self._server = server
        self._servicer = servicer
        self._health = health_

    def begin_drain(self) -> None:
        """Refuse new requests with UNAVAILABLE and turn NOT_SERVING; live requests go on."""
        self._servicer.draining = True
        self._health.begin_drain()

    async def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no request is live; False when `timeout_s` passed first."""
        try:
            await asyncio.wait_for(self._servicer.wait_idle(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def end_rest(self, *, flush_s: float = 1.0) -> None:
        """End the requests that are still live with UNAVAILABLE, and give them time to say so."""
        self._servicer.end_rest(NotReady("the server is shutting down; send the request elsewhere"))
        await self.wait_idle(flush_s)

    async def stop(self) -> None:
        """Close the port and every call at once."""
        await self._server.stop(grace=None)
        await self._health.close()

    def statistics(self) -> FrontendStatistics:
        servicer = self._servicer
        return FrontendStatistics(
            live=servicer.num_live,
            requests=servicer.num_requests,
            refused=servicer.num_refused,
            draining=servicer.draining,
            link=servicer.link.statistics(),
        )


async def start_frontend(
    config: ServerConfig,
    link: ReplicaLink,
    tokenizer: Tokenizer | None,
    *,
    cache: CacheConfig,
    configuration: Mapping[str, str],
    request_log: RequestLog,
) -> FrontendServer:
    """Listen on `config.host` and `config.port`. The link may still be connecting.

    `cache` says how prompts share prefixes, `configuration` is what GetServerInfo shows.
    Raises ConfigError when the port is taken.
    """
    max_bytes = int(config.max_message_mb * 2**20)
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", min(2**31 - 1, TRANSPORT_FACTOR * max_bytes)),
            ("grpc.max_send_message_length", -1),
            # Two servers on one port would each get some of the calls.
            ("grpc.so_reuseport", 0),
            # Finds clients that vanished without a word within a minute.
            ("grpc.keepalive_time_ms", 40_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        )
    )
    servicer = JaxserveServicer(
        link, tokenizer, cache, configuration=configuration, request_log=request_log
    )
    health_ = health.Health([_JAXSERVE.full_name])
    link.add_listener(health_.set_ready)
    server.add_generic_rpc_handlers(_handlers(servicer, max_bytes=max_bytes))
    health_pb2_grpc.add_HealthServicer_to_server(health_.servicer, server)
    names = (_JAXSERVE.full_name, _ADMIN.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        port = server.add_insecure_port(f"{config.host}:{config.port}")
    except RuntimeError as error:
        await health_.close()
        raise ConfigError(
            f"port: got {config.port} on {config.host}, which cannot be bound; is another server "
            "using it? try --port=0 for any free one"
        ) from error
    await server.start()
    return FrontendServer(server, servicer, health_, port)


# ------------------------------------------------------------------------------------ binding


def _handlers(
    servicer: JaxserveServicer, *, max_bytes: int
) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
    calls = {
        "Generate": (pb.GenerateRequest, servicer.generate),
        "GenerateOnce": (pb.GenerateRequest, servicer.generate_once),
        "Abort": (pb.AbortRequest, servicer.abort),
        "Tokenize": (pb.TokenizeRequest, servicer.tokenize),
        "Detokenize": (pb.DetokenizeRequest, servicer.detokenize),
        "ListModels": (pb.ListModelsRequest, servicer.list_models),
        "GetModelInfo": (pb.GetModelInfoRequest, servicer.get_model_info),
        "GetServerInfo": (pb.GetServerInfoRequest, servicer.get_server_info),
        "GetStatistics": (pb.GetStatisticsRequest, servicer.get_statistics),
        "GetLoads": (pb.GetLoadsRequest, servicer.get_loads),
        "SubscribeKvEvents": (pb.SubscribeKvEventsRequest, servicer.subscribe_kv_events),
    }
    served = {
        method.name: _handler(method, _guarded(*calls[method.name], max_bytes=max_bytes))
        for method in _JAXSERVE.methods
    }
    unbuilt = {method.name: _handler(method, _not_built(method)) for method in _ADMIN.methods}
    return (
        grpc.method_handlers_generic_handler(_JAXSERVE.full_name, served),
        grpc.method_handlers_generic_handler(_ADMIN.full_name, unbuilt),
    )


def _handler(method: Any, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Any:
    """A handler that gets the request as bytes: `wire.parse` names what is wrong with them."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    return make(behaviour, response_serializer=_serialize)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _guarded(
    kind: type[Message], call: Callable[[Any, Context], Awaitable[Any]], *, max_bytes: int
) -> Callable[[bytes, Context], Awaitable[Any]]:
    """`call` with its request parsed, and every error as a status."""

    async def behaviour(data: bytes, context: Context) -> Any:
        try:
            return await call(parse(kind, data, max_bytes=max_bytes), context)
        except JaxserveError as error:
            await _refuse(context, error)
        except Exception:
            await _refuse(context, log_fault(f"serving {call.__name__}"))

    return behaviour


def _not_built(method: Any) -> Callable[[Any, Context], Awaitable[Any]]:
    async def behaviour(request: Any, context: Context) -> Any:
        await _refuse(context, NotBuilt(f"{method.full_name} is not served by this build"))

    return behaviour


async def _refuse(context: Context, error: JaxserveError) -> None:
    status = to_status(error)
    await context.abort(status.code, status.message, status.metadata)
