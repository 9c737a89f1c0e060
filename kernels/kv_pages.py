"""The KV pool of one layer: how pages are laid out, written, copied and read back.

Knows the layout; does not know which page belongs to whom (that is `schedulers`) nor how pages are
attended to (`paged_attention`).

Dimension key: T tokens  K kv heads  C channels per head  N pages in the pool  S slots per page
M pages named in one call

Keys are stored transposed, [N, K, C, S], values as they come, [N, K, S, C]. So in both products
of attention the axis that is *not* summed is the contiguous one, and a CPU multiplies whole vectors
without ever adding up lanes: q.k runs along S for a fixed channel, p.v along C for a fixed slot.
A page is contiguous for each kv head, which is also the axis that tensor parallelism cuts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class KvPages(NamedTuple):
    """The pages of one layer. A pytree, so it can be a donated argument or a loop's carry."""

    k_NKCS: jax.Array
    v_NKSC: jax.Array

    @property
    def num_pages(self) -> int:
        return self.v_NKSC.shape[0]

    @property
    def page_size(self) -> int:
        return self.v_NKSC.shape[2]


class RowPages(NamedTuple):
    """The pages of one layer as GPU and TPU kernels read them: a token's key and value in one row.

    Dimension key: D = 2C, keys in 0..C-1 and values in C..2C-1  Z = 2S, scales of keys, then of
    values. One copy moves keys and values, and on a TPU, whose rows have 128 lanes, heads of 64
    channels waste nothing. `scale_NKZ` (float32) is there for int8 and fp8 pages only: a stored
    number times its token's and head's scale is what was written.
    """

    kv_NKSD: jax.Array
    scale_NKZ: jax.Array | None

    @property
    def num_pages(self) -> int:
        return self.kv_NKSD.shape[0]

    @property
    def page_size(self) -> int:
        return self.kv_NKSD.shape[2]


def init_pages(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
) -> KvPages:
    """Return zeroed pages for one layer: 2 * N * K * S * C numbers of `dtype`.

    Raises ValueError when `page_size` is not a power of two of at least 8, or `head_dim` not a
    multiple of 8: the CPU kernel works in blocks of 8 slots and 8 channels.
    """
    if page_size < 8 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two >= 8, got {page_size}; try 16 or 32")
    if head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8, got {head_dim}; try 64 or 128")
    return KvPages(
        jnp.zeros((num_pages, kv_heads, head_dim, page_size), dtype),
        jnp.zeros((num_pages, kv_heads, page_size, head_dim), dtype),
    )


def write_kv(
    pages: KvPages,
    k_TKC: Float[Array, "T K C"],
    v_TKC: Float[Array, "T K C"],
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
) -> KvPages:
    """Store token t at slot `slot_T[t]` of page `page_T[t]`; returns the changed pages.

    A page id outside 0..N-1 drops the write: that is how padding and finished rows write nothing.
    In a loop whose carry is donated this happens in place. No two tokens may share a slot.
    """
    # Unsigned, or a page id of -1 would count from the end of the pool as Python does.
    at_T = (page_T.astype(jnp.uint32), slice(None), slice(None), slot_T)
    k_NKCS = pages.k_NKCS.at[at_T].set(
        k_TKC.astype(pages.k_NKCS.dtype), mode="drop", unique_indices=True
    )
    v_NKSC = pages.v_NKSC.at[at_T[0], :, slot_T].set(
        v_TKC.astype(pages.v_NKSC.dtype), mode="drop", unique_indices=True
    )
    return KvPages(k_NKCS, v_NKSC)


def copy_pages(pages: KvPages, src_M: Int[Array, " M"], dst_M: Int[Array, " M"]) -> KvPages:
    """Copy page `src_M[i]` onto page `dst_M[i]`; a destination outside 0..N-1 drops the copy.

    All sources are read before any destination is written. Destinations must differ.
    """
    dst_M = dst_M.astype(jnp.uint32)
    return KvPages(
        *(
            x.at[dst_M].set(x.at[src_M].get(mode="clip"), mode="drop", unique_indices=True)
            for x in pages
        )
    )


def read_pages(
    pages: KvPages, page_M: Int[Array, " M"]
) -> tuple[Float[Array, "M S K C"], Float[Array, "M S K C"]]:
    """Return the keys and values of some pages in token order, whatever the stored layout."""
    k_MKCS = pages.k_NKCS.at[page_M].get(mode="clip")
    v_MKSC = pages.v_NKSC.at[page_M].get(mode="clip")
    return k_MKCS.transpose(0, 3, 1, 2), v_MKSC.transpose(0, 2, 1, 3)
