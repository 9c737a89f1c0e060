"""The front end's servers: binds gRPC and HTTP to ports, names every error, drains and stops.

Knows sockets and statuses. What the calls do is in `servicer.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.errors import ConfigError, JaxserveError, NotBuilt, NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.status import to_status
from jaxserve.server import health, metrics
from jaxserve.server.desk import Desk
from jaxserve.server.http_app import make_app
from jaxserve.server.http_server import HttpServer
from jaxserve.server.link import LinkStatistics
from jaxserve.server.request_log import log_fault
from jaxserve.server.servicer import Context, JaxserveServicer
from jaxserve.server.wire import parse
from jaxserve.server_config import ServerConfig

_JAXSERVE: Final = pb.DESCRIPTOR.services_by_name["Jaxserve"]
_ADMIN: Final = pb.DESCRIPTOR.services_by_name["Admin"]
TRANSPORT_FACTOR: Final = 4
"""gRPC drops messages over its own limit with RESOURCE_EXHAUSTED, before we see them; ours, which
answers INVALID_ARGUMENT and says what is allowed, is this much lower."""
STATISTICS_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class FrontendStatistics:
    live: int
    requests: int
    refused: int
    draining: bool
    link: LinkStatistics


class FrontendServer:
    """A listening front end. Made by `start_frontend`; all methods belong to one event loop.

    `port` is gRPC's, `http_port` HTTP's, or None where it is not served.
    """

    def __init__(
        self,
        desk: Desk,
        server: grpc.aio.Server,
        http: HttpServer | None,
        health_: health.Health,
        port: int,
    ):
        self.port = port
        self.http_port = None if http is None else http.port
        self._desk = desk
        self._server = server
        self._http = http
        self._health = health_

    def begin_drain(self) -> None:
        """Refuse new requests with UNAVAILABLE and turn NOT_SERVING; live requests go on."""
        self._desk.draining = True
        self._health.begin_drain()

    async def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no request is live; False when `timeout_s` passed first."""
        try:
            await asyncio.wait_for(self._desk.wait_idle(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def end_rest(self, *, flush_s: float = 1.0) -> None:
        """End the requests that are still live with UNAVAILABLE, and give them time to say so."""
        self._desk.end_rest(NotReady("the server is shutting down; send the request elsewhere"))
        await self.wait_idle(flush_s)

    async def stop(self) -> None:
        """Close the ports and every call at once."""
        await self._server.stop(grace=None)
        if self._http is not None:
            await self._http.stop()
        await self._health.close()

    def statistics(self) -> FrontendStatistics:
        desk = self._desk
        return FrontendStatistics(
            live=desk.num_live,
            requests=desk.num_requests,
            refused=desk.num_refused,
            draining=desk.draining,
            link=desk.link.statistics(),
        )


async def start_frontend(
    config: ServerConfig, desk: Desk, *, configuration: Mapping[str, str]
) -> FrontendServer:
    """Listen on the ports of `config`. The desk's link may still be connecting.

    `configuration` is what GetServerInfo shows. Raises ConfigError when a port is taken.
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
    servicer = JaxserveServicer(desk, configuration=configuration)
    health_ = health.Health([_JAXSERVE.full_name])
    desk.link.add_listener(health_.set_ready)
    server.add_generic_rpc_handlers(_handlers(desk, servicer, max_bytes=max_bytes))
    health_pb2_grpc.add_HealthServicer_to_server(health_.servicer, server)
    names = (_JAXSERVE.full_name, _ADMIN.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        port = _bind(server, config.host, config.port)
        http = await _start_http(config, desk, port, max_bytes=max_bytes)
    except ConfigError:
        await health_.close()
        raise
    await server.start()
    return FrontendServer(desk, server, http, health_, port)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    try:
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigError(
            f"port: got {port} on {host}, which cannot be bound; is another server using it? try "
            "--port=0 for any free one"
        ) from error


async def _start_http(
    config: ServerConfig, desk: Desk, grpc_port: int, *, max_bytes: int
) -> HttpServer | None:
    if config.http_port == -1:
        return None
    port = config.http_port
    if port is None:
        port = 0 if config.port == 0 else grpc_port + 1

    async def exposition() -> tuple[bytes, str]:
        return await _exposition(desk, names_clients=config.names_clients)

    app = make_app(desk, max_body_bytes=max_bytes, exposition=exposition)
    return await HttpServer.start(app, host=config.host, port=port)


async def _exposition(desk: Desk, *, names_clients: bool) -> tuple[bytes, str]:
    """The metrics page and its content type; without the engine's part while it is away."""
    replica, name, model = None, "", ""
    with suppress(NotReady, grpc.aio.AioRpcError):
        description = desk.link.description
        name, model = description.replica, description.model.model
        request = pb.GetStatisticsRequest(
            per_client=names_clients, most_clients=metrics.MOST_CLIENTS
        )
        replica = await desk.link.stub.GetStatistics(request, timeout=STATISTICS_TIMEOUT_S)
    page = metrics.exposition(
        desk.metrics, replica, model_name=model, engine=name, num_live=desk.num_live
    )
    return page, metrics.CONTENT_TYPE


# ------------------------------------------------------------------------------------ binding


def _handlers(
    desk: Desk, servicer: JaxserveServicer, *, max_bytes: int
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
        method.name: _handler(
            method, _guarded(desk, method, *calls[method.name], max_bytes=max_bytes)
        )
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
    desk: Desk,
    method: Any,
    kind: type[Message],
    call: Callable[[Any, Context], Awaitable[Any]],
    *,
    max_bytes: int,
) -> Callable[[bytes, Context], Awaitable[Any]]:
    """`call` with its request parsed, and every error as a status."""
    generates = kind is pb.GenerateRequest

    async def behaviour(data: bytes, context: Context) -> Any:
        reading = desk.reading(method=method.name, peer=context.peer())
        try:
            with reading if generates else nullcontext():
                message = parse(kind, data, max_bytes=max_bytes)
            return await call(message, context)
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
