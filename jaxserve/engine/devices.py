"""From `--mesh` to devices."""

import os
from typing import Final

import jax
from jax.sharding import Mesh

from jaxserve.models.config import ModelConfig
from jaxserve.models.partition import can_share, share_of, tensor_mesh

# Measured on 2 cores only; each device more makes every sum over devices dearer.
_MOST_CPU_DEVICES: Final = 4


def open_mesh(mesh: str, config: ModelConfig) -> Mesh:
    """The devices of `mesh`: `tp=N`, or `auto`.

    On a CPU the devices are made here: each is a thread of its own that runs its share of the
    program, and `auto` takes one per core, as far as the model can be cut and no kv head is held
    twice. On accelerators `auto` is one device. Raises ConfigError when the model cannot be cut so
    or devices are missing.
    """
    wanted = None if mesh == "auto" else int(mesh.removeprefix("tp="))
    share_of(config, wanted or 1)
    threads = wanted or _devices_for_cores(config)
    try:
        jax.config.update("jax_num_cpu_devices", threads)
    except RuntimeError:
        threads = min(threads, len(jax.devices()))  # JAX runs already, with the devices it has
    if wanted is None:
        wanted = threads if jax.default_backend() == "cpu" else 1
    return tensor_mesh(wanted)


def _devices_for_cores(config: ModelConfig) -> int:
    most = min(len(os.sched_getaffinity(0)), _MOST_CPU_DEVICES)
    return max(n for n in range(1, most + 1) if can_share(config, n))
