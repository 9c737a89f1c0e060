"""The decode steps that attention kernels are timed on: sizes, lengths and page tables.

Shared by our kernels and by other libraries, which run in another Python. Knows numpy only.

Dimension key: B rows  P pages per row
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

LARGEST_ERROR: Final = 2e-2
"""Of a row in bfloat16 over its largest number; a kernel that is further off was not timed."""

_TABLE_UNIT: Final = 16  # of pages: JAX's own kernel cuts tables into that many parts


class Sizes(NamedTuple):
    """What is measured. `TINY` proves the way on a CPU; its numbers mean nothing."""

    copy_bytes: int
    matrix: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    decode: tuple[tuple[str, tuple[int, ...]], ...]  # name, length of each row
    prefill: int  # tokens of one prompt
    block: int  # queries per block of it
    budget_s: float  # per measurement


def _mixed(rows: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths spread evenly over their logarithm, in random order."""
    lengths = np.geomspace(shortest, longest, rows).astype(int)
    return tuple(np.random.default_rng(0).permutation(lengths).tolist())


FULL: Final = Sizes(
    copy_bytes=2**31,
    matrix=8192,
    heads=32,
    kv_heads=8,
    head_dim=128,
    page_size=64,
    decode=(
        ("64 x 4k", (4096,) * 64),
        ("64 x 128..16k", _mixed(64, 128, 16384)),
        ("64 x 1k", (1024,) * 64),
        ("256 x 1k", (1024,) * 256),
        ("1 x 16k", (16384,)),
    ),
    prefill=8192,
    block=64,
    budget_s=0.5,
)
TINY: Final = Sizes(
    copy_bytes=2**20,
    matrix=64,
    heads=4,
    kv_heads=2,
    head_dim=64,
    page_size=16,
    decode=(("2 x 32", (32, 32)), ("3 x 1..48", (1, 7, 48))),
    prefill=64,
    block=32,
    budget_s=0.01,
)


def page_tables(lengths: Sequence[int], page_size: int) -> tuple[np.ndarray, int]:
    """table_BP of rows of these lengths, their pages scattered over a pool that holds no other;
    and the pages of the pool. What is past a row's pages is 0."""
    num_pages_B = -(-np.array(lengths) // page_size)
    width = -(-num_pages_B.max() // _TABLE_UNIT) * _TABLE_UNIT
    table_BP = np.zeros((len(lengths), width), np.int32)
    shuffled = np.random.default_rng(0).permutation(num_pages_B.sum())
    for row, own in zip(table_BP, np.split(shuffled, np.cumsum(num_pages_B)[:-1]), strict=True):
        row[: len(own)] = own
    return table_BP, len(shuffled)


def read_bytes(sizes: Sizes, lengths: Sequence[int], itemsize: int = 2) -> int:
    """Bytes of keys and values that one decode step must read; numbers of one byte have scales."""
    head_bytes = 2 * (sizes.head_dim * itemsize + (4 if itemsize == 1 else 0))
    return sum(lengths) * sizes.kv_heads * head_bytes
