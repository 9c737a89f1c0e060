"""Which implementation of an array operation runs, and where.

Knows the names of the implementations and the device that programs are traced for; knows no
operation. Kernels in Pallas run compiled on their own platform, and interpreted on a CPU, where
tests hold them to the reference; on the other accelerator they are refused.
"""

from typing import Any, Final

import jax

CPU: Final = "cpu"
PALLAS_GPU: Final = "pallas_gpu"
PALLAS_TPU: Final = "pallas_tpu"
XLA: Final = "xla"
REFERENCE: Final = "reference"

# One row per implementation: the platforms it runs on. "auto" takes the first row that fits.
PLATFORMS: Final[dict[str, frozenset[str]]] = {
    CPU: frozenset({"cpu"}),
    PALLAS_GPU: frozenset({"gpu", "cpu"}),
    PALLAS_TPU: frozenset({"tpu", "cpu"}),
    XLA: frozenset({"cpu", "gpu", "tpu"}),
    REFERENCE: frozenset({"cpu", "gpu", "tpu"}),
}
_PALLAS: Final = {"gpu": PALLAS_GPU, "tpu": PALLAS_TPU}  # what "pallas" names there
_SPELLINGS: Final = {"cuda": "gpu", "rocm": "gpu"}


def resolve(backend: str, *, platform: str | None = None) -> str:
    """Return the implementation that `backend` names on `platform` (default: `target_platform`).

    "auto" is the fastest one there and "pallas" the platform's own Pallas kernels; every other name
    is returned as it is, or refused.
    Raises ValueError when the name is unknown or does not run on the platform.
    """
    platform = target_platform() if platform is None else platform
    fitting = [name for name, platforms in PLATFORMS.items() if platform in platforms]
    if not fitting:
        known = sorted(frozenset.union(*PLATFORMS.values()))
        raise ValueError(f"no kernel backend for platform {platform!r}; known platforms: {known}")
    if backend == "auto":
        return fitting[0]
    if backend == "pallas":
        backend = _PALLAS.get(platform, backend)
    if backend not in fitting:
        raise ValueError(
            f"kernel backend {backend!r} does not run on {platform!r}; try auto or one of {fitting}"
        )
    return backend


def is_interpreted(backend: str, *, platform: str | None = None) -> bool:
    """Whether a resolved backend is a Pallas kernel that the platform can but interpret."""
    platform = target_platform() if platform is None else platform
    return backend in _PALLAS.values() and platform == "cpu"


def target_platform() -> str:
    """The platform that what is traced now will run on: cpu, gpu or tpu.

    The mesh says so inside `jax.shard_map`, also when programs are compiled for devices that this
    machine does not have; elsewhere it is where JAX runs.
    """
    return platform_of(_target_device())


def target_device_kind() -> str:
    """The kind of the device that `target_platform` is the platform of, as JAX names it."""
    return _target_device().device_kind


def _target_device() -> Any:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if device is None else device


def platform_of(device: Any) -> str:
    """The platform of a device, real or abstract: cpu, gpu or tpu."""
    return _SPELLINGS.get(device.platform) or str(device.platform)
