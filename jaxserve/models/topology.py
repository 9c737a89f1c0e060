"""Topologies by name: `v5e:2x2` is four TPU v5e in a square, `h200:4` four H200 in one machine.

Loads no JAX and no compiler.
"""

import math
from dataclasses import dataclass
from typing import Final

from jaxserve.errors import ConfigError
from jaxserve.schedulers.estimators.roofline_time import DEVICES, Device

_FLAT: Final = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES: Final = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_MACHINES: Final = ("1", "2", "4", "8")

TPUS: Final[dict[str, tuple[str, ...]]] = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES}
"""The slices that a cloud rents out, by chip, up to 256 chips (v5p: 128)."""
GPUS: Final[dict[str, tuple[str, ...]]] = {"h200": _MACHINES, "h100": _MACHINES, "a100": _MACHINES}
"""How many share a machine and its NVLink."""
TOPOLOGIES: Final = TPUS | GPUS

_ACCELERATOR_TYPES: Final = {"v5e": "v5litepod-{chips}", "v6e": "v6e-{chips}", "v5p": "v5p-{cores}"}
_CORES: Final = {"v5p": 2}


@dataclass(frozen=True, slots=True)
class Topology:
    """`chip` is a name of DEVICES; `name` is what libtpu calls the whole, if it is of TPUs."""

    name: str
    chip: str
    num_chips: int

    @property
    def platform(self) -> str:
        """As kernels/backend.py names it: tpu or gpu."""
        return "tpu" if self.chip in TPUS else "gpu"

    @property
    def device(self) -> Device:
        """The chip's data sheet."""
        return DEVICES[self.chip]

    @property
    def accelerator_type(self) -> str:
        """What TPU_ACCELERATOR_TYPE is on such a slice of TPUs; v5p counts its cores."""
        cores = self.num_chips * _CORES.get(self.chip, 1)
        return _ACCELERATOR_TYPES[self.chip].format(chips=self.num_chips, cores=cores)


def parse_topology(text: str) -> Topology:
    """Raises ConfigError, naming what is known, for a topology that is not."""
    chip, _, sides = text.partition(":")
    if sides not in TOPOLOGIES.get(chip, ()):
        known = [chip] if chip in TOPOLOGIES else list(TOPOLOGIES)
        names = "; ".join(f"{one}:{', '.join(TOPOLOGIES[one])}" for one in known)
        raise ConfigError(f"topology: got {text!r}; allowed: {names}")
    return Topology(text, chip, math.prod(int(side) for side in sides.split("x")))
