"""Weights as TPU programs take them: fused projections as a matrix per device."""

import dataclasses

import jax
import numpy as np

from jaxserve.engine.programs import flatten_projection
from jaxserve.models.config import SHAPES
from jaxserve.models.partition import share_of, tensor_mesh
from jaxserve.models.sources import load_weights, parse_source

CONFIG = dataclasses.replace(SHAPES["tiny"], qkv_bias=True)


def test_a_device_has_its_own_projections_side_by_side() -> None:
    mesh, share = tensor_mesh(2), share_of(CONFIG, 2)
    weights = load_weights(parse_source("random:tiny"), CONFIG, dtype="float32", seed=0, mesh=mesh)
    layer = weights["layers"][0]
    for weight in (layer["attention"]["qkv"]["kernel"], layer["mlp"]["gate_up"]["kernel"]):
        wanted = [np.asarray(shard.data) for shard in weight.addressable_shards]
        flat = flatten_projection(weight)
        assert flat.ndim == 2 and weight.is_deleted()
        for shard, whole in zip(flat.addressable_shards, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(shard.data).reshape(whole.shape), whole)
    assert flat.addressable_shards[0].data.shape == (share.width, 2 * share.mlp_width)


def test_other_weights_stay_as_they_are() -> None:
    weights = load_weights(
        parse_source("random:tiny"), CONFIG, dtype="float32", seed=0, mesh=tensor_mesh(2)
    )
    fused = ("qkv.kernel", "gate_up.kernel")
    for path, weight in jax.tree_util.tree_leaves_with_path(weights):
        if ".".join(str(key.key) for key in path[-2:]) not in fused:
            assert flatten_projection(weight) is weight
