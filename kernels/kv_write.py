"""Write new keys and values into pages, in place, quantising on the way.

Knows one layer's pages and a batch of tokens; knows no row, slice or scheduler. One operation
serves decode rows (one token each) and prompt chunks.

Dimension key: T tokens  K kv heads  C channels per head  N pages in the pool  S slots per page
D >= 2C  Z = 2S

On a GPU a Pallas kernel writes through aliased buffers (kv_write_gpu.py). Everywhere else it is
XLA's scatter, which works in place where the pages are donated or carried by a loop: a token moves
2 * K * C numbers against the whole prefix that attention reads, so a TPU has nothing to gain from
a kernel of its own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import backend as backends
from . import quant
from .kv_pages import KvPages, Pages, RowPages


def write_kv(
    pages: Pages,
    k_TKC: Float[Array, "T K C"],
    v_TKC: Float[Array, "T K C"],
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    *,
    backend: str = "auto",
) -> Pages:
    """Store token t at slot `slot_T[t]` of page `page_T[t]`; returns the changed pages.

    A page id outside 0..N-1 drops the write: that is how padding and finished rows write nothing.
    In a loop whose carry is donated this happens in place. No two tokens may share a slot. Raises
    ValueError when the backend is unknown or does not run here.
    """
    backend = backends.resolve(backend)
    if implementation(backend) == backends.PALLAS_GPU and isinstance(pages, RowPages):
        from . import kv_write_gpu

        return kv_write_gpu.write(
            pages,
            k_TKC,
            v_TKC,
            page_T,
            slot_T,
            interpret=backends.is_interpreted(backend),
        )
    # Unsigned, or a page id of -1 would count from the end of the pool as Python does.
    new = k_TKC, v_TKC, page_T.astype(jnp.uint32), slot_T
    return _scatter(pages, *new) if isinstance(pages, KvPages) else _scatter_rows(pages, *new)


def implementation(backend: str) -> str:
    """What writes where a resolved `backend` attends: `pallas_gpu` or `xla`."""
    return backend if backend == backends.PALLAS_GPU else backends.XLA


def _scatter(pages: KvPages, k_TKC, v_TKC, page_T, slot_T) -> KvPages:
    k_NKCS = pages.k_NKCS.at[page_T, slice(None), slice(None), slot_T].set(
        k_TKC.astype(pages.k_NKCS.dtype), mode="drop", unique_indices=True
    )
    v_NKSC = pages.v_NKSC.at[page_T, :, slot_T].set(
        v_TKC.astype(pages.v_NKSC.dtype), mode="drop", unique_indices=True
    )
    return KvPages(k_NKCS, v_NKSC)


def _scatter_rows(pages: RowPages, k_TKC, v_TKC, page_T, slot_T) -> RowPages:
    # With an index for the kv head too: XLA would rather have the heads of a slot side by side,
    # and for a scatter of all heads at once it copies the whole pool to that layout and back (TPU).
    at_T1, head_1K, slot_T1 = page_T[:, None], jnp.arange(k_TKC.shape[1])[None], slot_T[:, None]
    scale_NKZ = pages.scale_NKZ
    if scale_NKZ is not None:
        k_TKC, k_scale_TK = quant.quantise(k_TKC, pages.kv_NKSD.dtype)
        v_TKC, v_scale_TK = quant.quantise(v_TKC, pages.kv_NKSD.dtype)
        for half, scale_TK in enumerate((k_scale_TK, v_scale_TK)):
            scale_NKZ = scale_NKZ.at[at_T1, head_1K, half * pages.page_size + slot_T1].set(
                scale_TK, mode="drop", unique_indices=True
            )
    kv_TKD = jnp.concatenate([k_TKC, v_TKC], axis=-1).astype(pages.kv_NKSD.dtype)
    unused = pages.kv_NKSD.shape[-1] - kv_TKD.shape[-1]
    kv_TKD = jnp.pad(kv_TKD, ((0, 0), (0, 0), (0, unused)))
    kv_NKSD = pages.kv_NKSD.at[at_T1, head_1K, slot_T1].set(
        kv_TKD, mode="drop", unique_indices=True
    )
    return RowPages(kv_NKSD, scale_NKZ)
