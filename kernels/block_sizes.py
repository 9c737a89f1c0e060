"""Block sizes of the attention kernels: a table by device kind, head size, page size and dtype.

Knows numbers only; what they mean to a kernel stands at their fields. `scripts/tune_kernels`
measures on the device at hand and writes the rows between the marks below. A shape without a row
gets its platform's default: a rule, written for the chip that the platform is mostly met as.
"""

from typing import Final, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike


class DecodeBlocks(NamedTuple):
    """How one query per row is worked on (GPU)."""

    step_keys: int  # keys per step of the inner loop, a power of two of at least 16
    piece_keys: int  # a row is cut into pieces of at least so many keys
    most_pieces: int  # and into at most so many pieces, a power of two
    programs: int  # that share all pieces; several per multiprocessor
    num_warps: int
    num_stages: int  # steps whose keys and values are on their way at once


class TileBlocks(NamedTuple):
    """How tiles of several queries are worked on (GPU)."""

    step_keys: int
    rows: int  # query rows (queries times heads of a group) per program, a power of two
    num_warps: int
    num_stages: int


class GpuBlocks(NamedTuple):
    decode: DecodeBlocks
    tile: TileBlocks


# Device kind (as JAX names it), head size, page size, dtype of the pages.
# tuned rows begin
GPU: Final[dict[tuple[str, int, int, str], GpuBlocks]] = {}
# tuned rows end

_SMS: Final = 132  # H100 and H200; on a chip with fewer the programs of a decode step queue up


def gpu_blocks(device_kind: str, *, head_dim: int, page_size: int, dtype: DTypeLike) -> GpuBlocks:
    """The table's row, or `default_gpu_blocks`; `device_kind` is JAX's name, "NVIDIA H200" say."""
    name = jnp.dtype(dtype).name
    row = GPU.get((device_kind, head_dim, page_size, name))
    return default_gpu_blocks(head_dim, name) if row is None else row


def default_gpu_blocks(head_dim: int, dtype: DTypeLike) -> GpuBlocks:
    """Sizes for a Hopper chip, from what its compiler says of registers and shared memory.

    Decode: steps of 32 KiB (16 for bytes, whose conversion takes registers), one on its way while
    one is worked on; three programs of 72 KiB and 4 warps of 150 registers fit a multiprocessor, so
    there are three. They keep 96 KiB on their way; at 4.8 TB/s and a microsecond 36 would do.
    Triton counts the look-up in the page table as a stage, hence 5 stages for two buffers, and the
    copies overlap nothing with fewer. Tiles: 128 rows on 8 warps of 180 registers, one program per
    multiprocessor; float32, which no matrix unit takes, would spill with more than 32 rows.
    """
    itemsize = jnp.dtype(dtype).itemsize
    key_bytes = 2 * pl.next_power_of_2(head_dim) * max(2, itemsize)
    step_keys = max(16, min(128, 32768 // key_bytes))
    return GpuBlocks(
        decode=DecodeBlocks(
            step_keys=step_keys,
            piece_keys=256,
            most_pieces=32,
            programs=3 * _SMS,
            num_warps=4,
            num_stages=7 if itemsize == 1 else 5,
        ),
        tile=TileBlocks(
            step_keys=16 if itemsize == 4 else min(64, step_keys),
            rows=32 if itemsize == 4 else 128,
            num_warps=8,
            num_stages=5,
        ),
    )
