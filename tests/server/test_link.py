"""What happens to requests when their engine goes."""

import asyncio

import pytest

from jaxserve.errors import ConfigError, NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.frontend import start_frontend
from jaxserve.server.link import MAX_ATTEMPTS
from jaxserve.server_config import ServerConfig


async def collect(stream):
    return [chunk async for chunk in stream]


async def test_a_request_without_a_token_outlives_its_engine_a_begun_one_does_not(serve):
    async with serve() as served:
        replica = served.replica
        begun_stream = served.client.generate([1], request_id="begun")
        begun = asyncio.create_task(anext(begun_stream))
        first = await replica.next_submit()
        replica.send(first, [7])
        assert (await begun).token_ids == (7,)
        queued = asyncio.create_task(
            collect(served.client.generate([2], request_id="queued", timeout_s=10))
        )
        second = await replica.next_submit()
        await replica.stop()
        with pytest.raises(NotReady, match="restarted while it answered"):
            await anext(begun_stream)
        await replica.start()
        again = await replica.next_submit()
        assert again.request_id == "queued" and again.attempt > second.attempt
        assert again.prompt == second.prompt and again.sampling == second.sampling
        assert 0 < again.timeout_s < second.timeout_s
        replica.report(
            replica.delta(second, [8]),  # the old engine's, come late
            replica.delta(again, [9], finish=pb.FINISH_REASON_LENGTH),
        )
        (chunk,) = await queued
        assert chunk.token_ids == (9,)
        statistics = served.link.statistics()
        assert (statistics.resubmitted, statistics.stale_deltas) == (1, 1)
        assert (statistics.reconnects, statistics.in_flight) == (1, 0)


async def test_generate_once_begins_again_since_nothing_was_shown(serve):
    async with serve() as served:
        replica = served.replica
        task = asyncio.create_task(served.client.generate_once([1], detokenize=False))
        replica.send(await replica.next_submit(), [7, 7])
        await asyncio.sleep(0.05)
        await replica.stop()
        await replica.start()
        replica.send(await replica.next_submit(), [8], finish=pb.FINISH_REASON_LENGTH)
        done = await task
        assert done.samples[0].token_ids == (8,) and done.usage.completion_tokens == 1


async def test_a_request_that_no_engine_survives_ends(serve):
    async with serve() as served:
        task = asyncio.create_task(served.client.generate_once([1]))
        for _ in range(MAX_ATTEMPTS):
            await served.replica.next_submit()
            await served.replica.stop()
            await served.replica.start()
        with pytest.raises(NotReady, match=f"{MAX_ATTEMPTS} engines ended while"):
            await task


async def test_a_request_that_left_while_the_engine_was_away_is_not_sent_again(serve):
    async with serve() as served:
        task = asyncio.create_task(served.client.generate_once([1]))
        await served.replica.next_submit()
        await served.replica.stop()
        task.cancel()
        assert await served.frontend.wait_idle(2)
        await served.replica.start()
        await served.link.wait_ready(5)
        await asyncio.sleep(0.05)
        assert len(served.replica.submits) == 1


async def test_closing_the_link_ends_what_is_in_flight(serve):
    async with serve() as served:
        task = asyncio.create_task(served.client.generate_once([1]))
        await served.replica.next_submit()
        await served.link.close()
        with pytest.raises(NotReady, match="shutting down"):
            await task


async def test_a_reused_id_never_gets_the_old_requests_tokens(serve):
    async with serve() as served:
        task = asyncio.create_task(served.client.generate_once([1], request_id="same"))
        old = await served.replica.next_submit()
        task.cancel()
        assert await served.frontend.wait_idle(2)
        task = asyncio.create_task(served.client.generate_once([1], request_id="same"))
        new = await served.replica.next_submit()
        served.replica.report(
            served.replica.delta(old, [5]),
            served.replica.delta(new, [6], finish=pb.FINISH_REASON_LENGTH),
        )
        assert (await task).samples[0].token_ids == (6,)


async def test_a_port_in_use_is_one_clear_error(serve):
    async with serve() as served:
        port = served.frontend.port
        with pytest.raises(ConfigError, match=f"port: got {port} on 127.0.0.1.*--port=0"):
            await start_frontend(ServerConfig(port=port), served.desk, configuration={})
