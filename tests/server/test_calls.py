"""The calls beside generation, health and reflection."""

import asyncio

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxserve import __version__
from jaxserve.errors import BadRequest, NotReady, UnknownModel
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_tokenize_and_detokenize_are_the_tokenizer(serve, tokenizer):
    async with serve() as served:
        text = "best of times 🙂"
        ids = await served.client.tokenize(text)
        assert ids == tokenizer.encode(text).tolist()
        assert await served.client.detokenize([*ids, 0]) == text
        assert await served.client.detokenize([0], skip_special_tokens=False) == "<eos>"
        long = text * 4000  # long enough to be encoded in a thread
        assert await served.client.tokenize(long) == tokenizer.encode(long).tolist()
        with pytest.raises(BadRequest, match=r"token_ids\[1\]: got 400; allowed: 0 to 399"):
            await served.client.detokenize([1, 400])


async def test_inventory(serve):
    async with serve() as served:
        assert await served.client.models() == ["tiny"]
        info = await served.client.model_info("tiny")
        assert (info.vocab_size, info.has_tokenizer) == (400, True)
        with pytest.raises(UnknownModel, match="model: got 'other'"):
            await served.client.model_info("other")
        server = await served.client.server_info()
        assert (server.version, server.schema) == (__version__, "jaxserve.v1")
        assert (server.state, server.page_size) == ("serving", 8)
        assert server.configuration["model"] == "tiny" and server.uptime_s > 0


async def test_statistics_loads_and_kv_events_come_from_the_replica(serve):
    async with serve() as served:
        (replica,) = await served.client.statistics()
        assert replica.values == {"running": 3.0} and replica.engine_restarts == 2
        stub = pb_grpc.JaxserveStub(served.channel)
        served.frontend.begin_drain()
        loads = [report async for report in stub.GetLoads(pb.GetLoadsRequest())]
        assert [report.dispatches_received for report in loads] == [0, 1, 2]
        assert all(report.draining for report in loads)
        request = pb.SubscribeKvEventsRequest(after_sequence=41)
        (batch,) = [batch async for batch in stub.SubscribeKvEvents(request)]
        assert batch.events[0].sequence == 42


@pytest.mark.parametrize(
    ("call", "request_", "words"),
    [
        ("GetLoads", pb.GetLoadsRequest(interval_s=-1), "interval_s: got -1.0"),
        ("SubscribeKvEvents", pb.SubscribeKvEventsRequest(replica="other"), "replica: got 'other'"),
        ("SubscribeKvEvents", pb.SubscribeKvEventsRequest(after_sequence=101), "too new"),
    ],
)
async def test_bad_subscriptions_are_refused(serve, call, request_, words):
    async with serve() as served:
        stub = pb_grpc.JaxserveStub(served.channel)
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await anext(aiter(getattr(stub, call)(request_)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ------------------------------------------------------------------------------- health


async def test_a_health_watch_sees_the_engine_go_and_come_and_the_drain_begin(serve):
    async with serve() as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        names = ("", "jaxserve.v1.Jaxserve")
        watches = [aiter(stub.Watch(health_pb2.HealthCheckRequest(service=name))) for name in names]

        async def statuses():
            return {(await asyncio.wait_for(anext(watch), 5)).status for watch in watches}

        assert await statuses() == {SERVING}
        await served.replica.stop()
        assert await statuses() == {NOT_SERVING}
        assert not await served.client.is_serving()
        with pytest.raises(NotReady, match="restarting"):
            await served.client.generate_once("x")
        with pytest.raises(NotReady, match="restarting"):
            await served.client.statistics()
        await served.replica.start()
        assert await statuses() == {SERVING}
        assert served.frontend.statistics().link.reconnects == 1
        served.frontend.begin_drain()
        assert await statuses() == {NOT_SERVING}


async def test_health_knows_its_services(serve):
    async with serve() as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service="jaxserve.v1.Jaxserve"))
        assert reply.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# ---------------------------------------------------------------------------- reflection


class ReflectionClient:
    """A stock client: knows the reflection protocol, learns everything else from the server."""

    def __init__(self, channel: grpc.aio.Channel):
        self._channel = channel
        self._stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        self._pool = descriptor_pool.DescriptorPool()

    async def _ask(self, **question):
        call = self._stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(**question)])
        )
        async for reply in call:
            return reply

    async def services(self) -> list[str]:
        reply = await self._ask(list_services="")
        return [service.name for service in reply.list_services_response.service]

    async def learn(self, symbol: str) -> None:
        reply = await self._ask(file_containing_symbol=symbol)
        for data in reply.file_descriptor_response.file_descriptor_proto:
            self._pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))

    def call(self, service: str, name: str):
        """The method's callable, and the class of its requests."""
        method = self._pool.FindServiceByName(service).FindMethodByName(name)
        request = message_factory.GetMessageClass(method.input_type)
        reply = message_factory.GetMessageClass(method.output_type)
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        return make(
            f"/{service}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        ), request


async def test_a_client_with_reflection_alone_lists_checks_health_and_streams(
    serve, answer, tokenizer
):
    ids = tokenizer.encode("it was the best of times").tolist()
    async with serve(script=answer(ids)) as served:
        client = ReflectionClient(served.channel)
        services = await client.services()
        assert {"jaxserve.v1.Jaxserve", "jaxserve.v1.Admin", "grpc.health.v1.Health"} <= set(
            services
        )
        await client.learn("grpc.health.v1.Health")
        check, request = client.call("grpc.health.v1.Health", "Check")
        assert (await check(request())).status == SERVING
        await client.learn("jaxserve.v1.Jaxserve")
        generate, request = client.call("jaxserve.v1.Jaxserve", "Generate")
        text = "".join([message.text async for message in generate(request(text="ROMEO:"))])
        assert text == "it was the best of times"
