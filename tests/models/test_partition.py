"""Tensor parallelism cuts a model into shares that compute what the whole computes."""

import dataclasses
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.engine.devices import open_mesh
from jaxserve.errors import ConfigError
from jaxserve.models.checkpoint import abstract_params
from jaxserve.models.config import SHAPES, ModelConfig
from jaxserve.models.decoder import Decoder, Init, causal_attention
from jaxserve.models.partition import (
    TP,
    loading_shardings,
    param_shardings,
    partition_specs,
    share_of,
    spread,
    spread_config,
    tensor_mesh,
)
from jaxserve.models.sources import load_weights, parse_source

TINY = SHAPES["tiny"]
VARIANTS = (
    TINY,
    dataclasses.replace(TINY, tied_embeddings=True),
    dataclasses.replace(TINY, qkv_bias=True),
    dataclasses.replace(TINY, qkv_bias=True, num_kv_heads=1),
)
NAMES = ("untied", "tied", "bias", "one kv head for two")


@pytest.mark.parametrize("config", VARIANTS, ids=NAMES)
def test_the_cuts_of_all_weights_give_the_weights_of_a_share(config: ModelConfig) -> None:
    mesh = tensor_mesh(2)
    shapes = (spread_config(config, 2), share_of(config, 2))
    whole, share = (abstract_params(each, dtype="float32") for each in shapes)
    cut = jax.tree.map(
        lambda x, where: where.shard_shape(x.shape), whole, param_shardings(mesh, whole)
    )
    assert cut == jax.tree.map(lambda x: x.shape, share)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("config", VARIANTS, ids=NAMES)
def test_shares_together_compute_what_the_whole_computes(config: ModelConfig, loop: bool) -> None:
    whole = Decoder(config, init=Init(jnp.float32, nnx.Rngs(0), scale=0.2))
    weights = nnx.to_pure_dict(nnx.state(whole))
    if config.qkv_bias:
        for layer in weights["layers"].values():
            bias = layer["attention"]["qkv"]["bias"]
            layer["attention"]["qkv"]["bias"] = jnp.cos(jnp.arange(bias.size)).reshape(bias.shape)
        nnx.update(whole, nnx.State(weights))
    token_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    token_BT = jnp.asarray(token_BT)
    position_BT = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))

    def logits(decoder: Decoder) -> jax.Array:
        hidden_BTD, _ = decoder(token_BT, position_BT, causal_attention(config), None, loop=loop)
        return decoder.logits(hidden_BTD)

    mesh = tensor_mesh(2)
    cut = spread(mesh, config, weights)
    share = partial(Decoder, share_of(config, 2), init=Init(jnp.float32), axis=TP)
    graph, state = nnx.split(nnx.eval_shape(share))

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(partition_specs(cut),),
        out_specs=P(),
        check_vma=False,
    )
    def parallel(weights):
        nnx.replace_by_pure_dict(state, weights)
        return logits(nnx.merge(graph, state))

    np.testing.assert_allclose(parallel(cut), logits(whole), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=NAMES)
def test_weights_read_for_a_mesh_are_those_that_a_device_has(config: ModelConfig) -> None:
    """Also where kv heads are fewer: they are read in another cut, and repeated then."""
    mesh, source = tensor_mesh(2), parse_source("random:tiny")
    alone = load_weights(source, config, dtype="bfloat16", seed=1)
    wanted = spread(mesh, config, alone)
    got = load_weights(source, config, dtype="bfloat16", seed=1, mesh=mesh)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
    reading = loading_shardings(mesh, alone)
    halves = jax.tree.map(
        lambda x, where: x.size // np.prod(where.shard_shape(x.shape)), alone, reading
    )
    assert halves["layers"][0]["attention"]["qkv"]["kernel"] == 2


def test_a_kv_head_of_two_devices_has_half_of_its_query_heads_on_each() -> None:
    config = dataclasses.replace(TINY, num_kv_heads=1)
    spread_out = spread_config(config, 2)
    assert (spread_out.num_kv_heads, spread_out.num_heads, spread_out.group) == (2, 4, 2)
    assert spread_out.kv_bytes_per_token(2) == 2 * config.kv_bytes_per_token(2)
    assert share_of(config, 2).num_kv_heads == 1


def test_a_model_that_cannot_be_cut_so_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"mesh: got tp=3; .*a divisor or a multiple of .*num_kv_heads \(2\)"
    ):
        open_mesh("tp=3", TINY)


def test_query_heads_that_devices_cannot_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh: got tp=8; .*a divisor of .*num_heads \(4\)"):
        open_mesh("tp=8", TINY)


def test_more_devices_than_there_are_is_refused() -> None:
    wide = dataclasses.replace(TINY, num_heads=8, num_kv_heads=8)
    with pytest.raises(ConfigError, match=r"mesh: got tp=4; allowed: up to 2, the devices"):
        open_mesh("tp=4", wide)


def test_auto_takes_a_device_per_core_as_far_as_the_model_can_be_cut() -> None:
    assert open_mesh("auto", dataclasses.replace(TINY, num_heads=3, num_kv_heads=3)).size == 1
    assert open_mesh("auto", dataclasses.replace(TINY, num_kv_heads=1)).size == 1
    assert open_mesh("auto", TINY).size == min(2, len(os.sched_getaffinity(0)))
