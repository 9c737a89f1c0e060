"""Block sizes of the attention kernels: a table by device kind, head size, page size and dtype.

Knows numbers only; what they mean to a kernel stands at their fields. `scripts/tune_kernels`
measures on the device at hand and writes the rows between the marks below. A shape without a row
gets its platform's default: a rule, written for the chip that the platform is mostly met as, or
for each kind of chip.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeVar

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


class TpuBlocks(NamedTuple):
    """How pages pass through fast memory (TPU), for decode and tiles alike."""

    block_bytes: int  # keys and values, all kv heads of a chip, that are attended to at once
    ring: int  # such blocks that there is room for: all but one are on their way
    cores: int  # that share one program


Key = tuple[str, int, int, str]
"""Device kind (as JAX names it), head size, page size, dtype of the pages."""

# tuned rows begin
GPU: Final[dict[Key, GpuBlocks]] = {}
TPU: Final[dict[Key, TpuBlocks]] = {}
# tuned rows end

_HOPPER: Final = ("NVIDIA H", "NVIDIA GH")  # H100, H200, GH200: with asynchronous matrix units
_SMS: Final = 132  # H100 and H200; on a chip with fewer the programs of a decode step queue up

# Not measured on a TPU, but read off the compiler's schedules: for 8 kv heads of 128 channels in
# bfloat16, a block of 128, 256, 512 keys takes 385, 620, 880 to 1020 instructions, each page about
# 25 and each block about 100 more; memory delivers a key in 7.5 cycles (v5e), 4.4 (v6e), 5.2 (a
# core of v5p).
_TPU_KINDS: Final = {
    "TPU v5 lite": TpuBlocks(block_bytes=1 << 20, ring=4, cores=1),
    "TPU v6 lite": TpuBlocks(block_bytes=2 << 20, ring=4, cores=1),
    "TPU v5": TpuBlocks(block_bytes=2 << 20, ring=4, cores=2),
}
_ANY_TPU: Final = TpuBlocks(block_bytes=1 << 20, ring=4, cores=1)

_Row = TypeVar("_Row")


def gpu_blocks(device_kind: str, *, head_dim: int, page_size: int, dtype: DTypeLike) -> GpuBlocks:
    """The table's row, or `default_gpu_blocks`; `device_kind` is JAX's name, "NVIDIA H200" say."""
    row = _found(GPU, device_kind, head_dim, page_size, dtype)
    return default_gpu_blocks(device_kind, head_dim, dtype) if row is None else row


def tpu_blocks(device_kind: str, *, head_dim: int, page_size: int, dtype: DTypeLike) -> TpuBlocks:
    """The table's row, or `default_tpu_blocks`; `device_kind` is JAX's name, "TPU v6 lite" say."""
    row = _found(TPU, device_kind, head_dim, page_size, dtype)
    return default_tpu_blocks(device_kind) if row is None else row


def _found(
    table: Mapping[Key, _Row], device_kind: str, head_dim: int, page_size: int, dtype: DTypeLike
) -> _Row | None:
    return table.get((device_kind, head_dim, page_size, jnp.dtype(dtype).name))


def default_tpu_blocks(device_kind: str) -> TpuBlocks:
    """Sizes for a kind of chip, whatever its pages: what is fetched at once is counted in bytes."""
    return _TPU_KINDS.get(device_kind, _ANY_TPU)


def default_gpu_blocks(device_kind: str, head_dim: int, dtype: DTypeLike) -> GpuBlocks:
    """Sizes from what the compiler says of registers and shared memory; for Hopper, and for others.

    Decode: steps of 32 KiB (16 for bytes, whose conversion takes registers), one on its way while
    one is worked on; three programs of 72 KiB and 4 warps of 150 registers fit a multiprocessor, so
    there are three. They keep 96 KiB on their way; at 4.8 TB/s and a microsecond 36 would do.
    Triton counts the look-up in the page table as a stage, hence 5 stages for two buffers, and the
    copies overlap nothing with fewer.
    """
    itemsize, lanes = jnp.dtype(dtype).itemsize, pl.next_power_of_2(head_dim)
    step_keys = max(16, min(128, 32768 // (2 * lanes * max(2, itemsize))))
    decode = DecodeBlocks(
        step_keys=step_keys,
        piece_keys=256,
        most_pieces=32,
        programs=3 * _SMS,
        num_warps=4,
        num_stages=7 if itemsize == 1 else 5,
    )
    return GpuBlocks(decode, _default_tile(device_kind.startswith(_HOPPER), lanes, itemsize))


def _default_tile(is_hopper: bool, lanes: int, itemsize: int) -> TileBlocks:
    """128 rows on 8 warps, one program per multiprocessor, in steps as long as nothing spills.

    On Hopper, in 16 bits and for heads of up to 128, that is 128 keys on 250 registers: 650
    instructions of each warp, where two steps of 64 take 880. Elsewhere the matrix unit takes its
    operands from registers. float32, which no matrix unit takes, has room for 32 rows.
    """
    if itemsize == 4:
        return TileBlocks(step_keys=16, rows=32, num_warps=8, num_stages=5)
    if not is_hopper:
        rows = 128 if lanes <= 128 else 64
        return TileBlocks(max(32, min(64, 4096 // lanes)), rows, num_warps=8, num_stages=5)
    if itemsize == 2 and lanes <= 128:
        return TileBlocks(step_keys=128, rows=128, num_warps=8, num_stages=4)
    return TileBlocks(min(64, 8192 // lanes), rows=128, num_warps=8, num_stages=5)
