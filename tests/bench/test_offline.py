import jax
import jax.numpy as jnp
import pytest

from jaxserve.bench.device_weights import draw_weights
from jaxserve.bench.offline import run_batch
from jaxserve.bench.peers.workload import equal_requests
from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.devices import open_mesh
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.models.config import SHAPES
from jaxserve.models.info import ModelInfo
from jaxserve.models.sources import load_weights, parse_source

TINY = SHAPES["tiny"]
CONFIG = EngineConfig(
    scheduler=SchedulerConfig(max_rows=4, max_prefill_tokens=64),
    cache=CacheConfig(page_size=16, num_pages=64),
)
INFO = ModelInfo(
    name="tiny",
    source="random:tiny",
    config=TINY,
    dtype="none",
    num_pages=64,
    page_size=16,
    programs=0,
    kernels={},
    platform="cpu",
    device_kind="scripted",
    num_devices=0,
)


def run(**sizes):
    requests = equal_requests(TINY.vocab_size, seed=0, **sizes)
    return run_batch(CONFIG, ScriptedExecutor(vocab_size=TINY.vocab_size), INFO, requests)


def test_a_batch_runs_to_its_end_whatever_the_rows():
    result = run(count=9, prompt_tokens=40, output_tokens=12)
    assert result.useful_tokens == 9 * 12 and result.wall_s > 0


def test_a_request_that_is_refused_ends_the_batch():
    with pytest.raises(RuntimeError, match="not run to its end"):
        run(count=2, prompt_tokens=40, output_tokens=TINY.max_context)


def test_weights_from_the_device_are_what_a_random_model_has():
    mesh = open_mesh("tp=1", TINY)
    drawn = draw_weights(TINY, dtype="bfloat16", mesh=mesh)
    read = load_weights(parse_source("random:tiny"), TINY, dtype="bfloat16", seed=0, mesh=mesh)
    assert jax.tree.structure(drawn) == jax.tree.structure(read)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(read), strict=True
    ):
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)
        spread = [float(jnp.std(x.astype(jnp.float32))) for x in (one, other)]
        assert spread[0] == pytest.approx(spread[1], rel=0.2), path
