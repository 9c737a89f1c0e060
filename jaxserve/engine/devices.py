"""From `--mesh` to devices."""

import importlib.util
import os
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

import jax
from jax.sharding import Mesh

from jaxserve.models.config import ModelConfig
from jaxserve.models.partition import can_share, share_of, tensor_mesh

# Measured on 2 cores only; each device more makes every sum over devices dearer.
_MOST_CPU_DEVICES: Final = 4
_SAY_PLATFORMS: Final = ("JAX_FORCE_TPU_INIT", "PJRT_NAMES_AND_LIBRARY_PATHS")  # to JAX
_CUDA_PLUGINS: Final = frozenset({"xla_cuda12", "xla_cuda13"})
_GOOGLE: Final = "0x1ae0"  # as a vendor of PCI devices


def open_mesh(mesh: str, config: ModelConfig) -> Mesh:
    """The devices of `mesh`: `tp=N`, or `auto`.

    On a CPU the devices are made here: each is a thread of its own that runs its share of the
    program, and `auto` takes one per core, as far as the model can be cut and no kv head is held
    twice. On accelerators `auto` is one device. Raises ConfigError when the model cannot be cut so
    or devices are missing.
    """
    name_lone_platform()
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


def name_lone_platform() -> None:
    """Tell JAX that it runs on the CPU where it could find nothing else, if nobody told it.

    With a compiler for absent chips installed it looks for the chips otherwise: libtpu writes its
    own lines about not finding any, and the plug-in for CUDA about libraries that only a GPU needs.
    Where there may be such a chip, or another plug-in brings a platform, JAX decides alone.
    """
    told = jax.config.values["jax_platforms"] or any(map(os.environ.get, _SAY_PLATFORMS))
    plugins = _plugins()
    looks = importlib.util.find_spec("libtpu") is not None or plugins
    if told or not looks or may_have_tpu() or may_have_gpu() or plugins - _CUDA_PLUGINS:
        return
    jax.config.update("jax_platforms", "cpu")


def _plugins() -> set[str]:
    """The plug-ins that JAX would load, by module."""
    found = {entry.value.rpartition(".")[2] for entry in entry_points(group="jax_plugins")}
    spec = importlib.util.find_spec("jax_plugins")
    folders = (spec and spec.submodule_search_locations) or ()
    return found | {module.name for module in pkgutil.iter_modules(folders)}


def may_have_gpu(root: Path = Path("/")) -> bool:
    """Whether there is a device node that CUDA could use: of a card, a board, or under Windows."""
    names = ("dev/nvidia*", "dev/nvhost*", "dev/nvmap", "dev/dxg")
    return any(True for name in names for _ in root.glob(name))


def may_have_tpu(root: Path = Path("/")) -> bool:
    """Whether the machine has a device that could be a TPU: one of Google's, or one given to user
    space. More than TPUs are: what is taken for one is looked for by JAX itself."""
    nodes = [*root.glob("dev/accel*"), *root.glob("dev/vfio/[0-9]*")]
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    return bool(nodes) or any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def _devices_for_cores(config: ModelConfig) -> int:
    most = min(len(os.sched_getaffinity(0)), _MOST_CPU_DEVICES)
    return max(n for n in range(1, most + 1) if can_share(config, n))
