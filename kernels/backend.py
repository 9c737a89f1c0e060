"""Which implementation of an array operation runs.

Knows the names of the implementations and the platform JAX runs on; knows no operation.
"""

from typing import Final

import jax

# One row per implementation: the platforms it runs on. "auto" takes the first row that fits.
PLATFORMS: Final[dict[str, frozenset[str]]] = {
    "cpu": frozenset({"cpu"}),
    "xla": frozenset({"cpu", "gpu", "tpu"}),
    "reference": frozenset({"cpu", "gpu", "tpu"}),
}


def resolve(backend: str, *, platform: str | None = None) -> str:
    """Return the implementation that `backend` names on `platform` (default: where JAX runs).

    "auto" is the fastest one there; every other name is returned as it is, or refused.
    Raises ValueError when the name is unknown or does not run on the platform.
    """
    platform = jax.default_backend() if platform is None else platform
    fitting = [name for name, platforms in PLATFORMS.items() if platform in platforms]
    if not fitting:
        known = sorted(frozenset.union(*PLATFORMS.values()))
        raise ValueError(f"no kernel backend for platform {platform!r}; known platforms: {known}")
    if backend == "auto":
        return fitting[0]
    if backend not in fitting:
        raise ValueError(
            f"kernel backend {backend!r} does not run on {platform!r}; try auto or one of {fitting}"
        )
    return backend
