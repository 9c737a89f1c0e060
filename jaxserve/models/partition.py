"""How a model is cut for tensor parallelism: each device's share, and where each weight is cut.

A device holds some kv heads with their query heads, some of the MLP and a range of the vocabulary;
norms are held by all. A share is a smaller model: the decoder runs it as such, and adds and gathers
over the mesh axis TP. Where there are more devices than kv heads, each kv head is held by several,
every one of them with a part of its query heads. Source: Shoeybi et al. 2019 (Megatron-LM).

Weights and pages name their axes; RULES says which mesh axis cuts which. A mesh of more axes is
more rules.

Dimension key: D model width  K kv heads  G query heads per kv head  C channels per head
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig

TP: Final = "tp"

RULES: Final[dict[str, str]] = {"heads": TP, "kv_heads": TP, "mlp": TP, "vocab": TP}
"""From a named axis to the mesh axis that cuts it; an axis without a rule is whole everywhere."""

_WEIGHT_AXES: Final[dict[str, tuple[str, ...]]] = {
    "embedding": ("vocab", "width"),
    "qkv.kernel": ("width", "kv_heads", "group", "channels"),
    "qkv.bias": ("kv_heads", "group", "channels"),
    "out.kernel": ("heads", "width"),
    "gate_up.kernel": ("width", "gate_up", "mlp"),
    "down.kernel": ("mlp", "width"),
    "head.kernel": ("width", "vocab"),
}
"""The weights that are cut, by the last two names of their paths; all others are whole."""

_BY_KV_HEAD: Final = tuple(n for n, axes in _WEIGHT_AXES.items() if "kv_heads" in axes)
_CUT_FIELDS: Final = ("num_heads", "mlp_width", "vocab_size")


def axes_spec(*axes: str) -> PartitionSpec:
    """How an array is cut whose axes have these names; axes that are not named are whole."""
    cuts: list[str | None] = [RULES.get(axis) for axis in axes]
    while cuts and cuts[-1] is None:
        cuts.pop()
    return PartitionSpec(*cuts)


def tensor_mesh(num_devices: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The first of `devices` (default: JAX's own), as one axis TP.

    Raises ConfigError when there are not so many.
    """
    devices = list(jax.devices() if devices is None else devices)
    if num_devices > len(devices):
        raise ConfigError(f"mesh: got tp={num_devices}; allowed: up to {len(devices)}, the devices")
    return jax.make_mesh((num_devices,), (TP,), (AxisType.Auto,), devices=devices[:num_devices])


def can_share(config: ModelConfig, num_devices: int) -> bool:
    """Whether the model can be cut into so many equal shares without holding a kv head twice."""
    fields = ("num_kv_heads", *_CUT_FIELDS)
    return all(getattr(config, field) % num_devices == 0 for field in fields)


def spread_config(config: ModelConfig, num_devices: int) -> ModelConfig:
    """The model as `num_devices` devices hold it together: with a kv head for each of them.

    That is the model itself unless there are more devices than kv heads; then each kv head is there
    several times, with a part of its query heads each. Raises ConfigError when the model cannot be
    cut so.
    """
    kv_heads = config.num_kv_heads
    if max(kv_heads, num_devices) % min(kv_heads, num_devices):
        raise ConfigError(
            f"mesh: got tp={num_devices}; allowed: a divisor or a multiple of the model's"
            f" num_kv_heads ({kv_heads})"
        )
    for field in _CUT_FIELDS:
        if getattr(config, field) % num_devices:
            raise ConfigError(
                f"mesh: got tp={num_devices}; allowed: a divisor of the model's {field}"
                f" ({getattr(config, field)})"
            )
    return dataclasses.replace(config, num_kv_heads=max(kv_heads, num_devices))


def share_of(config: ModelConfig, num_devices: int) -> ModelConfig:
    """The shape of one device's share. Raises ConfigError when the model cannot be cut so."""
    whole = spread_config(config, num_devices)
    fields = ("num_kv_heads", *_CUT_FIELDS)
    return dataclasses.replace(
        whole, **{field: getattr(whole, field) // num_devices for field in fields}
    )


def partition_specs(params: Any) -> Any:
    """A tree like `params` (nested dicts, as `nnx.to_pure_dict` gives) of how each is cut."""
    return _map_names(lambda name, _: axes_spec(*_WEIGHT_AXES.get(name, ())), params)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Where each of `params`, of a model as it is spread over `mesh`, lives there."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(params))


def loading_shardings(mesh: Mesh, params: Any) -> Any:
    """Where each of a model's own `params` is read to, for `spread` to make the rest of it.

    The same, but for fused projections of fewer kv heads than devices, which cannot be cut so yet:
    cut along the model width they take no more memory than they will.
    """
    return _map_names(
        lambda name, leaf: NamedSharding(mesh, _loading_spec(name, leaf.shape, mesh.size)), params
    )


def spread(mesh: Mesh, config: ModelConfig, params: Any) -> Any:
    """A model's own `params` as they are served on `mesh`; see `spread_weight`."""
    return _map_names(lambda name, leaf: spread_weight(mesh, config, name, leaf), params)


def spread_weight(mesh: Mesh, config: ModelConfig, name: str, weight: Array) -> Array:
    """One weight, cut, with its kv heads repeated where there are more devices than them.

    `name` is the end of its path, such as "qkv.kernel". What is so already stays as it is.
    """
    where = NamedSharding(mesh, axes_spec(*_WEIGHT_AXES.get(name, ())))
    kv_heads = spread_config(config, mesh.size).num_kv_heads
    if name not in _BY_KV_HEAD or weight.shape[-3] == kv_heads:
        return jax.device_put(weight, where)
    at = NamedSharding(mesh, _loading_spec(name, weight.shape, mesh.size))
    repeat = jax.jit(_repeat_kv_heads, static_argnums=1, out_shardings=where)
    return repeat(jax.device_put(weight, at), kv_heads // weight.shape[-3])


def weight_name(path: Sequence[str | int]) -> str:
    """What the rules call a weight: the last two names of its path."""
    return ".".join(str(part) for part in path[-2:])


def _loading_spec(name: str, shape: tuple[int, ...], num_devices: int) -> PartitionSpec:
    if name not in _BY_KV_HEAD or shape[-3] % num_devices == 0:
        return axes_spec(*_WEIGHT_AXES.get(name, ()))
    by_width = len(shape) == 4 and shape[0] % num_devices == 0
    return PartitionSpec(TP) if by_width else PartitionSpec()


def _repeat_kv_heads(qkv: Shaped[Array, "*D K G2 C"], copies: int) -> Shaped[Array, "*D KN G2N C"]:
    """Each kv head `copies` times, with an equal part of its query heads each time."""
    *front, kv_heads, group, channels = qkv.shape
    q, kv = qkv[..., : group - 2, :], qkv[..., group - 2 :, :]
    q = q.reshape(*front, kv_heads * copies, (group - 2) // copies, channels)
    return jnp.concatenate([q, jnp.repeat(kv, copies, axis=-3)], axis=-2)


def _map_names(function: Callable[[str, Any], Any], params: Any) -> Any:
    def call(path: tuple[Any, ...], leaf: Any) -> Any:
        return function(weight_name([key.key for key in path]), leaf)

    return jax.tree_util.tree_map_with_path(call, params)
