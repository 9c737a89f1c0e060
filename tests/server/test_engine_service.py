"""The replica's service on a real socket: with the real core and the mock executor, and, where the
order of events matters, with a driver that does only what the test says."""

import asyncio
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from jaxserve.clock import MonotonicClock
from jaxserve.config import SchedulerConfig
from jaxserve.engine.core import CoreConfig, EngineCore, Rejection
from jaxserve.engine.driver import EngineDriver
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.errors import NotReady, QueueFull
from jaxserve.histogram import Histogram
from jaxserve.models.config import ModelConfig
from jaxserve.models.info import ModelInfo
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.request import Delta, FinishReason, Limits
from jaxserve.server.describe import describe
from jaxserve.server.engine_service import EngineService

LIMITS = Limits(vocab_size=1000, max_context=256, max_samples=4)
INFO = ModelInfo(
    name="tiny",
    source="test",
    config=ModelConfig(
        name="tiny",
        num_layers=1,
        width=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=8,
        vocab_size=1000,
        max_context=256,
        eos_token_ids=(999,),
    ),
    dtype="float32",
    num_pages=64,
    page_size=8,
    programs=0,
    kernels={"attention": "none"},
    platform="cpu",
    device_kind="none",
    num_devices=1,
)


class FakeDriver:
    """Remembers what it was told; reports only when the test does."""

    def __init__(self):
        self.told = []

    def submit(self, request):
        self.told.append(("submit", request.request_id))

    def abort(self, request_id, *, sample=-1, reason=FinishReason.ABORT, keep_tokens=None):
        self.told.append(("abort", request_id, sample, reason, keep_tokens))

    def limit_row(self, request_id, sample, max_steps):
        self.told.append(("limit", request_id, sample, max_steps))

    def call(self, function):
        future = Future()
        future.set_result(function(None))
        return future


def mock_driver(on_report):
    core = EngineCore(
        CoreConfig(
            limits=LIMITS,
            model_key="tiny",
            num_pages=64,
            page_size=8,
            tile=1,
            scheduler=SchedulerConfig(),
        )
    )
    executor = ScriptedExecutor(vocab_size=1000, eos_token_ids=(999,))
    return EngineDriver(
        core, executor, MonotonicClock(), info=INFO, on_report=on_report, on_failure=print
    )


@asynccontextmanager
async def serving(driver, path, restarts=0):
    """The service around `driver`, and a stub that speaks to it."""
    description = describe(INFO, LIMITS, dispatch_s=3e-3, replica="replica-0")
    service = EngineService(
        driver, description=description, clock=MonotonicClock(), restarts=restarts
    )
    server = grpc.aio.server()
    pb_grpc.add_ReplicaServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        yield service, pb_grpc.ReplicaStub(channel)
    await server.stop(None)


@asynccontextmanager
async def mock_engine(path):
    """The service around the real core; every report must come from the dispatch thread."""
    loop = asyncio.get_running_loop()
    wakes = []

    def on_report(dispatch, deltas, rejections):
        wakes.append(threading.current_thread().name)
        loop.call_soon_threadsafe(service.deliver, dispatch, deltas, rejections)

    driver = mock_driver(on_report)
    async with serving(driver, path, restarts=2) as (service, stub):
        driver.start()
        yield stub, wakes
        driver.stop()


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 20))


def submit(request_id, prompt=(1, 2, 3), *, attempt=1, **fields):
    sampling = pb.SamplingParams(
        seed=0, n=fields.pop("n", 1), max_tokens=fields.pop("max_tokens", 9)
    )
    return pb.EngineCommand(
        submit=pb.Submit(
            request_id=request_id,
            prompt=np.asarray(prompt, "<i4").tobytes(),
            sampling=sampling,
            attempt=attempt,
            **fields,
        )
    )


async def until(call, done):
    """Reports until one satisfies `done`."""
    reports = []
    while not (reports and done(reports)):
        report = await call.read()
        assert report is not grpc.aio.EOF
        reports.append(report)
    return reports


async def eventually(condition):
    while not condition():
        await asyncio.sleep(0.005)


def finishes(reports):
    return {d.request_id: d.finish for r in reports for d in r.deltas if d.finish}


def test_one_report_a_slice_carries_all_rows(tmp_path):
    async def scenario():
        async with mock_engine(tmp_path / "s") as (stub, wakes):
            call = stub.Exchange()
            for number in range(8):
                await call.write(submit(f"r{number}", (10 * number,), attempt=number + 5))
            reports = await until(call, lambda reports: len(finishes(reports)) == 8)
            tokens = {f"r{number}": [] for number in range(8)}
            for report in reports:
                for delta in report.deltas:
                    tokens[delta.request_id] += delta.token_ids
                    assert delta.attempt == int(delta.request_id[1:]) + 5
            assert tokens == {
                f"r{number}": [10 * number + 1 + step for step in range(9)] for number in range(8)
            }
            assert set(finishes(reports).values()) == {pb.FINISH_REASON_LENGTH}
            assert set(wakes) == {"dispatch"} and len(wakes) == len(reports)

    run(scenario())


def test_samples_end_one_by_one_and_the_id_is_free_after_the_last(tmp_path):
    async def scenario():
        async with mock_engine(tmp_path / "s") as (stub, _):
            call = stub.Exchange()
            for attempt in (1, 2):
                await call.write(submit("r", n=3, attempt=attempt))
                reports = await until(
                    call,
                    lambda reports: (
                        len({d.sample for r in reports for d in r.deltas if d.finish}) == 3
                    ),
                )
                assert {d.attempt for r in reports for d in r.deltas} == {attempt}

    run(scenario())


def test_refusals_carry_code_and_attempt(tmp_path):
    async def scenario():
        async with mock_engine(tmp_path / "s") as (stub, _):
            call = stub.Exchange()
            await call.write(submit("empty", (), attempt=4))
            await call.write(submit("resumed", resume_tokens=b"\0\0\0\0", attempt=5))
            await call.write(
                pb.EngineCommand(submit=pb.Submit(request_id="damaged", prompt=b"abc", attempt=6))
            )
            reports = await until(call, lambda reports: sum(len(r.rejected) for r in reports) == 3)
            rejected = {r.request_id: r for report in reports for r in report.rejected}
            assert rejected["empty"].code == "INVALID_ARGUMENT" and rejected["empty"].attempt == 4
            assert rejected["resumed"].code == "UNIMPLEMENTED"
            assert rejected["damaged"].code == "INTERNAL" and rejected["damaged"].attempt == 6
            await call.write(submit("next"))
            await until(call, finishes)

    run(scenario())


def test_describe_statistics_and_loads(tmp_path):
    async def scenario():
        async with mock_engine(tmp_path / "s") as (stub, _):
            described = await stub.Describe(pb.DescribeRequest())
            assert (described.replica, described.max_samples) == ("replica-0", 4)
            assert described.model.vocab_size == 1000 and described.model.num_parameters > 0
            assert described.server.kv_pages == 64 and described.server.state == "serving"
            assert described.server.kernels == {"attention": "none"}
            assert described.server.slice_dispatch_s == 3e-3

            call = stub.Exchange()
            await call.write(submit("r"))
            await until(call, finishes)
            statistics = await stub.GetStatistics(pb.GetStatisticsRequest())
            assert statistics.engine_restarts == 2
            assert statistics.values["output_tokens"] == 9
            steps = Histogram.from_flat("slice_steps", statistics.values)
            assert steps is not None and steps.count == statistics.values["slices"] > 0
            assert statistics.values["pool_total"] == 64

            loads = stub.GetLoads(pb.GetLoadsRequest(interval_s=0.02))
            first, second = await loads.read(), await loads.read()
            assert first.kv_pages_total == 64 and first.dispatches_received == 1
            assert second.at_s > first.at_s
            once = [report async for report in stub.GetLoads(pb.GetLoadsRequest(interval_s=0))]
            assert len(once) == 1

    run(scenario())


def test_kv_events_follow_a_snapshot_and_resume(tmp_path):
    async def scenario():
        async with mock_engine(tmp_path / "s") as (stub, _):
            events = stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest())
            snapshot = await events.read()
            assert snapshot.snapshot and not snapshot.events

            call = stub.Exchange()
            keys = [bytes([number]) * 16 for number in range(2)]
            await call.write(submit("r", range(16), page_keys=keys, scope="all"))
            await until(call, finishes)

            batch = await events.read()
            assert not batch.snapshot and batch.first_sequence == batch.events[0].sequence == 1
            stored = batch.events[0].stored
            assert list(stored.keys)[:2] == keys and stored.parent_key == b""
            again = stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest(after_sequence=10**9))
            replay = await again.read()
            assert replay.snapshot and replay.events[0].stored.keys == [keys[0]]

    run(scenario())


def test_a_broken_stream_aborts_its_requests_and_the_next_stream_starts_clean(tmp_path):
    async def scenario():
        driver = FakeDriver()
        async with serving(driver, tmp_path / "s") as (service, stub):
            call = stub.Exchange()
            await call.write(submit("a", attempt=1))
            await call.write(submit("b", attempt=2, n=2))
            await eventually(lambda: len(driver.told) == 2)
            call.cancel()
            aborts = [("abort", name, -1, FinishReason.ABORT, None) for name in "ab"]
            await eventually(lambda: driver.told[2:] == aborts)

            # The same id comes again before the core had its last word about the first.
            call = stub.Exchange()
            await call.write(submit("a", attempt=3))
            await eventually(lambda: driver.told[4:] == [("submit", "a")])
            service.deliver(1, [end("a"), end("b", 0), end("b", 1)], ())
            service.deliver(2, [Delta(request_id="a", sample=0, tokens=(7,))], ())
            report = await call.read()
            assert report.dispatch == 2 and [d.attempt for d in report.deltas] == [3]
            service.deliver(3, [end("a")], ())
            assert (await call.read()).deltas[0].finish == pb.FINISH_REASON_ABORT

    run(scenario())


def end(request_id, sample=0):
    return Delta(request_id=request_id, sample=sample, tokens=(), finish=FinishReason.ABORT)


def test_deltas_are_about_the_oldest_attempt_and_refusals_about_the_newest(tmp_path):
    async def scenario():
        driver = FakeDriver()
        async with serving(driver, tmp_path / "s") as (service, stub):
            call = stub.Exchange()
            await call.write(submit("a", attempt=1))
            await call.write(submit("a", attempt=2))
            await eventually(lambda: len(driver.told) == 2)
            full = Rejection("a", QueueFull("full", retry_after_s=1.5))
            service.deliver(1, [end("a")], [full])
            report = await call.read()
            assert report.deltas[0].attempt == 1
            assert report.rejected[0].attempt == 2 and report.rejected[0].retry_after_s == 1.5

    run(scenario())


def test_commands_reach_the_driver_in_order(tmp_path):
    async def scenario():
        driver = FakeDriver()
        async with serving(driver, tmp_path / "s") as (_, stub):
            call = stub.Exchange()
            await call.write(submit("a"))
            limit = pb.LimitRow(request_id="a", sample=1, max_steps=4)
            await call.write(pb.EngineCommand(limit=limit))
            abort = pb.EngineAbort(
                request_id="a", sample=1, reason=pb.FINISH_REASON_STOP, keep_tokens=0
            )
            await call.write(pb.EngineCommand(abort=abort))
            await eventually(lambda: len(driver.told) == 3)
            assert driver.told == [
                ("submit", "a"),
                ("limit", "a", 1, 4),
                ("abort", "a", 1, FinishReason.STOP, 0),
            ]

    run(scenario())


def test_a_drained_replica_refuses_and_then_aborts_what_is_left(tmp_path):
    async def scenario():
        driver = FakeDriver()
        async with serving(driver, tmp_path / "s") as (_, stub):
            call = stub.Exchange()
            await call.write(submit("a"))
            await call.write(pb.EngineCommand(drain=pb.Drain(drain_s=0.05)))
            await call.write(submit("late"))
            rejected = (await call.read()).rejected[0]
            assert (rejected.request_id, rejected.code) == ("late", NotReady.grpc_code)
            described = await stub.Describe(pb.DescribeRequest())
            assert described.server.state == "draining"
            await eventually(lambda: driver.told[-1][:2] == ("abort", "a"))

    run(scenario())


@pytest.mark.parametrize("end_first", [True, False])
def test_the_newest_stream_takes_over(tmp_path, end_first):
    async def scenario():
        driver = FakeDriver()
        async with serving(driver, tmp_path / "s") as (service, stub):
            old = stub.Exchange()
            await old.write(submit("a"))
            await eventually(lambda: len(driver.told) == 1)
            new = stub.Exchange()
            await new.write(submit("b", attempt=2))
            await eventually(lambda: ("submit", "b") in driver.told)
            assert await old.read() is grpc.aio.EOF
            assert ("abort", "a", -1, FinishReason.ABORT, None) in driver.told
            if end_first:
                service.deliver(1, [end("a")], ())
            service.deliver(2, [end("b")], ())
            assert [d.request_id for d in (await new.read()).deltas] == ["b"]

    run(scenario())
