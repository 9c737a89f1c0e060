"""How a model is cut for tensor parallelism: each device's share, and where each weight is cut.

A device holds some kv heads with their query heads, some of the MLP and a range of the vocabulary;
norms are held by all. A share is a smaller model: the decoder runs it as such, and adds and gathers
over the mesh axis TP. Source: Shoeybi et al. 2019 (Megatron-LM).
"""

import dataclasses
from typing import Any, Final

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig

TP: Final = "tp"

_CUTS: Final = {
    "embedding": PartitionSpec(TP),
    "qkv.kernel": PartitionSpec(None, TP),
    "qkv.bias": PartitionSpec(TP),
    "out.kernel": PartitionSpec(TP),
    "gate_up.kernel": PartitionSpec(None, None, TP),
    "down.kernel": PartitionSpec(TP),
    "head.kernel": PartitionSpec(None, TP),
}
_CUT_FIELDS: Final = ("num_kv_heads", "mlp_width", "vocab_size")


def tensor_mesh(num_devices: int) -> Mesh:
    """The first devices, as one axis TP. Raises ConfigError when there are not so many."""
    devices = jax.devices()
    if num_devices > len(devices):
        raise ConfigError(f"mesh: got tp={num_devices}; allowed: up to {len(devices)}, the devices")
    return jax.make_mesh((num_devices,), (TP,), (AxisType.Auto,), devices=devices[:num_devices])


def can_share(config: ModelConfig, num_devices: int) -> bool:
    """Whether the model can be cut into so many equal shares."""
    return all(getattr(config, field) % num_devices == 0 for field in _CUT_FIELDS)


def share_of(config: ModelConfig, num_devices: int) -> ModelConfig:
    """The shape of one device's share. Raises ConfigError when the model cannot be cut so."""
    for field in _CUT_FIELDS:
        if getattr(config, field) % num_devices:
            raise ConfigError(
                f"mesh: got tp={num_devices}; allowed: a divisor of the model's {field}"
                f" ({getattr(config, field)})"
            )
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // num_devices,
        **{field: getattr(config, field) // num_devices for field in _CUT_FIELDS},
    )


def partition_specs(params: Any) -> Any:
    """A tree like `params` (nested dicts, as `nnx.to_pure_dict` gives) of how each is cut."""

    def cut(path: tuple[Any, ...], _: Any) -> PartitionSpec:
        return _CUTS.get(".".join(str(key.key) for key in path[-2:]), PartitionSpec())

    return jax.tree_util.tree_map_with_path(cut, params)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Where each of `params` lives on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(params))
