"""Write new keys and values into pages, in place, quantising on the way.

Knows one layer's pages and a batch of tokens; knows no row, slice or scheduler. One operation
serves decode rows (one token each) and prompt chunks.

Dimension key: T tokens  K kv heads  C channels per head  N pages in the pool  S slots per page
D >= 2C  Z = 2S

On a GPU and on a TPU Pallas kernels write through aliased buffers (kv_write_gpu.py,
kv_write_tpu.py). Everywhere else it is XLA's scatter, which works in place where the pages are
donated or carried by a loop.
"""

from typing import Any, Final

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
    In a loop whose carry is donated this happens in place. No two tokens may share a slot, and
    those of one page stand next to each other, as a prompt's do. Raises ValueError when the backend
    is unknown, does not run here or does not read such pages.
    """
    backend = backends.resolve(backend)
    interpret = backends.is_interpreted(backend)
    if isinstance(pages, KvPages):
        if backend in _KERNELS:
            raise ValueError(f"kernel backend {backend!r} writes RowPages, got KvPages")
        return _scatter(pages, k_TKC, v_TKC, _unsigned(page_T), slot_T)
    # Pallas is imported where it is chosen, not before.
    if backend == backends.PALLAS_GPU:
        from . import kv_write_gpu

        return kv_write_gpu.write(pages, k_TKC, v_TKC, page_T, slot_T, interpret=interpret)
    rows = _as_rows(pages, k_TKC, v_TKC)
    if backend == backends.PALLAS_TPU:
        from . import kv_write_tpu

        return kv_write_tpu.write(pages, *rows, page_T, slot_T, interpret=interpret)
    return _scatter_rows(pages, *rows, _unsigned(page_T), slot_T)


_KERNELS: Final = (backends.PALLAS_GPU, backends.PALLAS_TPU)


def implementation(backend: str) -> str:
    """What writes where a resolved `backend` attends: a Pallas kernel of the same name, or XLA."""
    return backend if backend in _KERNELS else backends.XLA


def _unsigned(page_T: Array) -> Array:
    """Or a page id of -1 would count from the end of the pool as Python does."""
    return page_T.astype(jnp.uint32)


def _scatter(pages: KvPages, k_TKC, v_TKC, page_T, slot_T) -> KvPages:
    k_NKCS = pages.k_NKCS.at[page_T, slice(None), slice(None), slot_T].set(
        k_TKC.astype(pages.k_NKCS.dtype), mode="drop", unique_indices=True
    )
    v_NKSC = pages.v_NKSC.at[page_T, :, slot_T].set(
        v_TKC.astype(pages.v_NKSC.dtype), mode="drop", unique_indices=True
    )
    return KvPages(k_NKCS, v_NKSC)


def _scatter_rows(pages: RowPages, row_TKD, scale_TK2, page_T, slot_T) -> RowPages:
    # With an index for the kv head too: XLA would rather have the heads of a slot side by side,
    # and for a scatter of all heads at once it copies the whole pool to that layout and back (TPU).
    at_T1, head_1K, slot_T1 = page_T[:, None], jnp.arange(row_TKD.shape[1])[None], slot_T[:, None]
    put: dict[str, Any] = {"mode": "drop", "unique_indices": True}
    kv_NKSD = pages.kv_NKSD.at[at_T1, head_1K, slot_T1].set(row_TKD, **put)
    scale_NKZ = pages.scale_NKZ
    if scale_NKZ is not None:
        for half in range(2):
            at = at_T1, head_1K, half * pages.page_size + slot_T1
            scale_NKZ = scale_NKZ.at[at].set(scale_TK2[..., half], **put)
    return RowPages(kv_NKSD, scale_NKZ)


def _as_rows(pages: RowPages, k_TKC, v_TKC) -> tuple[Array, Array | None]:
    """Tokens as the pages store them: rows [T, K, D] and, where quantised, scales [T, K, 2]."""
    stored, scale_TK2 = pages.kv_NKSD.dtype, None
    if pages.scale_NKZ is not None:
        k_TKC, k_scale_TK = quant.quantise(k_TKC, stored)
        v_TKC, v_scale_TK = quant.quantise(v_TKC, stored)
        scale_TK2 = jnp.stack([k_scale_TK, v_scale_TK], axis=-1)
    row_TKD = jnp.concatenate([k_TKC, v_TKC], axis=-1).astype(stored)
    unused = pages.kv_NKSD.shape[-1] - row_TKD.shape[-1]
    return jnp.pad(row_TKD, ((0, 0), (0, 0), (0, unused))), scale_TK2
