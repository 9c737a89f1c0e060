"""Random weights drawn on the devices that hold them, in a second or two for 8B parameters.

`random:` models draw theirs on the host, a minute for that size, so that every engine can load the
same numbers; a benchmark of speed has no need of that. Knows the decoder's tree, not its use.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxserve.models.checkpoint import abstract_params
from jaxserve.models.config import ModelConfig
from jaxserve.models.partition import loading_shardings
from jaxserve.models.random_weights import INIT_STD


def draw_weights(config: ModelConfig, *, dtype: str, mesh: Mesh, seed: int = 0) -> Any:
    """The decoder's weights as a nested dict of arrays, spread over `mesh` as read ones are.

    Norms are ones, biases zeros, the rest is N(0, 0.02) as in `random:` models.
    """
    target = abstract_params(config, dtype=dtype)
    shardings = loading_shardings(mesh, target)
    leaves, tree = jax.tree_util.tree_flatten_with_path(target)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    weights = [
        _drawer(str(path[-1]), leaf.shape, leaf.dtype, where)(key)
        for (path, leaf), where, key in zip(leaves, jax.tree.leaves(shardings), keys, strict=True)
    ]
    return jax.tree.unflatten(tree, jax.block_until_ready(weights))


@cache
def _drawer(name: str, shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
    """A compiled function of a key; the layers share it."""

    def draw(key: jax.Array) -> jax.Array:
        if "scale" in name:
            return jnp.ones(shape, dtype)
        if "bias" in name:
            return jnp.zeros(shape, dtype)
        return INIT_STD * jax.random.normal(key, shape, dtype)

    return jax.jit(draw, out_shardings=where)
