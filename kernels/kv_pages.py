"""The KV pool of one layer: how pages are laid out, copied and read back.

Knows the layouts; does not know which page belongs to whom (that is `schedulers`), how pages are
written (`kv_write`) nor how they are attended to (`paged_attention`).

Dimension key: K kv heads  C channels per head  N pages in the pool  S slots per page
M pages named in one call  D >= 2C  Z = 2S

`KvPages` is the CPU's layout: keys are stored transposed, [N, K, C, S], values as they come,
[N, K, S, C]. So in both products of attention the axis that is *not* summed is the contiguous one,
and a CPU multiplies whole vectors without ever adding up lanes: q.k runs along S for a fixed
channel, p.v along C for a fixed slot. `RowPages` is the layout of GPU and TPU, whose matrix units
transpose for nothing. In both a page is contiguous for each kv head, which is also the axis that
tensor parallelism cuts.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from . import quant


class KvPages(NamedTuple):
    """The pages of one layer. A pytree, so it can be a donated argument or a loop's carry.

    It has no room for scales: pages of int8 or fp8 are `RowPages`.
    """

    k_NKCS: jax.Array
    v_NKSC: jax.Array

    @property
    def num_pages(self) -> int:
        return self.v_NKSC.shape[0]

    @property
    def page_size(self) -> int:
        return self.v_NKSC.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.v_NKSC.shape[1]

    @property
    def most_channels(self) -> int:
        return self.v_NKSC.shape[3]


class RowPages(NamedTuple):
    """The pages of one layer as GPU and TPU kernels read them: a token's key and value in one row.

    Dimension key: D = 2C, keys in 0..C-1 and values in C..2C-1, or more where rows fill whole
    lanes  Z = 2S, scales of keys, then of values. One copy moves keys and values, and on a TPU,
    whose rows have 128 lanes, heads of 64 channels waste nothing. `scale_NKZ` (float32) is there
    for int8 and fp8 pages only: a stored number times its token's and head's scale is what was
    written.
    """

    kv_NKSD: jax.Array
    scale_NKZ: jax.Array | None

    @property
    def num_pages(self) -> int:
        return self.kv_NKSD.shape[0]

    @property
    def page_size(self) -> int:
        return self.kv_NKSD.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_NKSD.shape[1]

    @property
    def most_channels(self) -> int:
        """The largest head that a row has room for."""
        return self.kv_NKSD.shape[3] // 2


Pages = KvPages | RowPages
_AnyPages = TypeVar("_AnyPages", bound=Pages)


def init_pages(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
) -> KvPages:
    """Return zeroed pages for one layer: 2 * N * K * S * C numbers of `dtype`.

    Raises ValueError when `page_size` is not a power of two of at least 8, or `head_dim` not a
    multiple of 8: the CPU kernel works in blocks of 8 slots and 8 channels. So it does for a
    quantised type.
    """
    if quant.is_quantised(dtype):
        raise ValueError(f"KvPages hold no {jnp.dtype(dtype).name}; RowPages do")
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two >= 8, got {page_size}; try 16 or 32")
    if head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8, got {head_dim}; try 64 or 128")
    return KvPages(
        jnp.zeros((num_pages, kv_heads, head_dim, page_size), dtype),
        jnp.zeros((num_pages, kv_heads, page_size, head_dim), dtype),
    )


def init_row_pages(
    num_pages: int,
    *,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike = jnp.float32,
    lanes: int = 1,
) -> RowPages:
    """Return zeroed row pages for one layer, with scales of 1 where `dtype` is quantised.

    A row is rounded up to a multiple of `lanes` numbers: 128 on a TPU, which would pad it anyway.
    """
    scale_NKZ = None
    if quant.is_quantised(dtype):
        scale_NKZ = jnp.ones((num_pages, kv_heads, 2 * page_size), jnp.float32)
    row = -(-2 * head_dim // lanes) * lanes
    return RowPages(jnp.zeros((num_pages, kv_heads, page_size, row), dtype), scale_NKZ)


def page_bytes(pages: Pages) -> int:
    """Bytes that one page of one layer takes, scales and filled lanes included. Shapes will do."""
    return sum(x.size // x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(pages))


def copy_pages(pages: _AnyPages, src_M: Int[Array, " M"], dst_M: Int[Array, " M"]) -> _AnyPages:
    """Copy page `src_M[i]` onto page `dst_M[i]`, scales too; a destination outside 0..N-1 drops it.

    All sources are read before any destination is written. Destinations must differ.
    """
    # Unsigned, or a page id of -1 would count from the end of the pool as Python does.
    dst_M = dst_M.astype(jnp.uint32)

    def copied(x: jax.Array) -> jax.Array:
        return x.at[dst_M].set(x.at[src_M].get(mode="clip"), mode="drop", unique_indices=True)

    return jax.tree.map(copied, pages)


def read_pages(
    pages: Pages, page_M: Int[Array, " M"], *, head_dim: int
) -> tuple[Float[Array, "M S K C"], Float[Array, "M S K C"]]:
    """Return the keys and values of some pages in token order, whatever the stored layout.

    `head_dim` is C, which `RowPages` do not know. Quantised pages come back as float32, the others
    as the type they are stored in.
    """
    if isinstance(pages, KvPages):
        k_MKCS = pages.k_NKCS.at[page_M].get(mode="clip")
        v_MKSC = pages.v_NKSC.at[page_M].get(mode="clip")
        return k_MKCS.transpose(0, 3, 1, 2), v_MKSC.transpose(0, 2, 1, 3)
    kv_MKSD = pages.kv_NKSD.at[page_M].get(mode="clip")
    k_MKSC, v_MKSC = jnp.split(kv_MKSD[..., : 2 * head_dim], 2, axis=-1)
    if pages.scale_NKZ is not None:
        k_MKS, v_MKS = jnp.split(pages.scale_NKZ.at[page_M].get(mode="clip"), 2, axis=-1)
        k_MKSC, v_MKSC = quant.dequantise(k_MKSC, k_MKS), quant.dequantise(v_MKSC, v_MKS)
    return k_MKSC.transpose(0, 2, 1, 3), v_MKSC.transpose(0, 2, 1, 3)
