"""Nothing compiles after warm-up, whatever requests ask for; and if it did, it would be seen."""

import queue
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxserve.bench.equality import PAGE_SIZE, make_mixed_requests
from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.build import build_engine
from jaxserve.engine.compile_count import CompileCount
from jaxserve.engine.statistics import Compiles, EngineStatistics
from jaxserve.request import FinishReason


def test_programs_count_by_when_they_were_compiled():
    count = CompileCount()
    jax.jit(lambda x: x + 1).lower(jnp.int32(1)).compile()
    before = count.compiles()
    assert before.startup >= 1 and before.serving == 0
    count.start_serving()
    assert count.compiles() == before
    function = jax.jit(lambda x: x * 3)
    argument = jnp.arange(7)
    compiled_now = count.compiles().serving
    function(argument)
    function(argument)
    assert count.compiles() == replace(before, serving=compiled_now + 1)
    assert CompileCount().compiles() == Compiles()


def serve(mesh: str, num_pages: int, max_rows: int) -> EngineStatistics:
    """What a real engine says after it served every kind of request."""
    jax.devices()  # those of all tests, before an engine asks for fewer
    ended: queue.Queue = queue.Queue()

    def on_report(dispatch, deltas, rejections):
        for delta in deltas:
            if delta.finish is not None:
                ended.put(delta.finish)

    driver = build_engine(
        EngineConfig(
            model="random:tiny",
            mesh=mesh,
            cache=CacheConfig(page_size=PAGE_SIZE, num_pages=num_pages),
            scheduler=SchedulerConfig(
                max_rows=max_rows, max_prefill_tokens=32, slice_steps=8, admission="reserve_prompt"
            ),
        ),
        on_report=on_report,
        on_failure=ended.put,
        progress=lambda _: None,
    )
    driver.start()
    requests = make_mixed_requests(max_rows)
    for request in requests:
        driver.submit(request)
    for _ in range(sum(request.params.n for request in requests)):
        assert isinstance(ended.get(timeout=60), FinishReason)
    statistics = driver.call(lambda core: core.statistics()).result(timeout=10)
    driver.stop()
    return statistics


def test_an_engine_that_serves_compiles_nothing():
    statistics = serve("tp=1", num_pages=20, max_rows=1)
    assert statistics.prefix and statistics.prefix.hit_tokens
    values = statistics.values()
    assert values["compiles_startup"] >= 4 and values["compiles_serving"] == 0
    assert values["page_size"] == PAGE_SIZE


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
def test_an_engine_of_many_rows_compiles_nothing(mesh: str):
    statistics = serve(mesh, num_pages=16, max_rows=9)
    assert statistics.preemptions
    assert statistics.compiles and statistics.compiles.serving == 0
