"""Attention from blocks of queries to the paged keys and values of their rows.

Knows one layer's pages and one batch of query blocks; knows no model, request or scheduler. One
operation serves decode (blocks of one query) and prefill (blocks of 16 or 32), and a batch may mix
rows of any length in any order: work follows the tokens that are there, not the longest row.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  N pages in the pool  S slots per page  P pages per row  R pages per chunk
X blocks taken together  M = G * Q

*A row does not see its neighbours.* Every sum runs over the row's own tokens in their order, and
what a longer neighbour adds is an exact zero or is never computed. In float32 a row's result has
the same bits in any batch, for decode kernels by construction; the dots of the block path go to a
library whose order may depend on Q and C, but not on B or on the other rows' lengths.

*Stale pages are harmless.* Slots past a row's length may hold anything, NaN included: their scores
are replaced, not multiplied by zero, and their values are never read or are replaced too.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from . import backend as backends
from . import paged_attention_cpu
from .kv_pages import KvPages, Pages, RowPages

# Tokens per step of the block path: a score tile of 128 keys stays in the cache.
_CHUNK_TOKENS: Final = 128
# Query blocks per step of the block path: enough for a batched dot, few enough that blocks of
# unlike lengths do not wait for each other.
_GROUP_BLOCKS: Final = 4
_LOWEST: Final = float(np.finfo(np.float32).min)


def paged_attention(
    q_BQHC: Float[Array, "B Q H C"],
    pages: Pages,
    table_BP: Int[Array, "B P"],
    len_B: Int[Array, " B"],
    start_B: Int[Array, " B"],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    first_page: Int[Array, ""] | int = 0,
    backend: str = "auto",
) -> Float[Array, "B Q H C"]:
    """Attend from blocks of consecutive queries to the pages of their rows; returns out_BQHC.

    Block b belongs to a row that holds `len_B[b]` keys, on the pages of `table_BP[b]` in order, the
    block's own keys included. Its query i stands at position `start_B[b] + i` and sees the keys at
    positions 0..start+i, never past the length; queries at or past the length are padding, and
    what is returned for them is finite and means nothing. A block of length 0 returns zeros.
    With a `window`, position p sees the `window` newest keys up to its own (Beltagy et al. 2020).
    Query head h reads kv head h // G. Scores are scaled by `scale` (default: C ** -0.5) and then,
    with a `soft_cap`, bent to cap * tanh(score / cap) (Gemma 2). The softmax and all sums are
    float32, whatever the types of queries and pages. Ids in the table count from `first_page`, so
    that one table serves every layer of a pool. A page id outside 0..N-1 is read as some page of
    the pool; entries of the table past a row's length mean nothing.

    `backend` is a name of backend.py. The decode kernel of `cpu` reads `KvPages` and the Pallas
    kernels `RowPages`; `xla` and `reference` read either.

    Raises ValueError when sizes disagree, scale or soft cap are not positive, or the backend is
    unknown or does not read such pages.
    Source: Kwon et al. 2023 (PagedAttention); the running softmax is Milakov and Gimelshein 2018.
    """
    H, C = q_BQHC.shape[2:]
    K, most = pages.num_kv_heads, pages.most_channels
    if H % K or (C > most if isinstance(pages, RowPages) else C != most):
        raise ValueError(
            f"pages hold {K} kv heads of {most} channels, got {H} query heads of {C};"
            " heads must be a multiple of the kv heads, and channels equal"
        )
    for said, value in (("scale", scale), ("soft_cap", soft_cap)):
        if value is not None and value <= 0:
            raise ValueError(f"{said}: got {value}; allowed: above 0")
    name = backends.resolve(backend)
    wanted = _LAYOUTS[name]
    if not isinstance(pages, wanted):
        raise ValueError(
            f"kernel backend {name!r} reads {wanted.__name__}, got {type(pages).__name__};"
            f" {backends.XLA!r} reads either"
        )
    attend = _find(name, one_query=q_BQHC.shape[1] == 1)
    options: dict[str, Any] = {"window": window, "soft_cap": soft_cap}
    options["scale"] = C**-0.5 if scale is None else scale
    if name == backends.PALLAS_GPU:
        options["first_page"] = first_page
    else:
        table_BP = table_BP + first_page
    return attend(q_BQHC, pages, table_BP, len_B, start_B, **options)


_LAYOUTS: Final[dict[str, Any]] = {
    backends.CPU: KvPages,
    backends.PALLAS_GPU: RowPages,
    backends.PALLAS_TPU: RowPages,
    backends.XLA: Pages,
    backends.REFERENCE: Pages,
}
_MODULES: Final = {
    backends.PALLAS_GPU: ".paged_attention_gpu",
    backends.PALLAS_TPU: ".paged_attention_tpu",
}


def _find(backend: str, *, one_query: bool) -> Callable[..., Any]:
    """The function behind a resolved backend. Pallas is imported where it is chosen, not before."""
    match backend:
        case backends.REFERENCE:
            return paged_attention_reference
        case backends.CPU if one_query:
            return paged_attention_cpu.attend
        case backends.PALLAS_GPU | backends.PALLAS_TPU:
            interpret = backends.is_interpreted(backend)
            return partial(_pallas(backend).attend, interpret=interpret)
        case _:
            return _attend_blocks


def _pallas(backend: str) -> Any:
    return import_module(_MODULES[backend], __package__)


def unsupported(
    backend: str, *, head_dim: int, page_size: int, dtype: DTypeLike, group: int
) -> str | None:
    """Say what of this a resolved backend has no kernel for, and what it has; None: all is well."""
    sizes: dict[str, Any] = {"head_dim": head_dim, "page_size": page_size}
    sizes |= {"dtype": dtype, "group": group}
    match backend:
        case backends.CPU:
            return paged_attention_cpu.unsupported(**sizes)
        case backends.PALLAS_GPU | backends.PALLAS_TPU:
            return _pallas(backend).unsupported(**sizes)
        case _:
            return None


def reads_rows(backend: str) -> bool:
    """Whether pages for a resolved backend are best made as `RowPages`: for all but `cpu`."""
    return backend != backends.CPU


# -- Reference: whole rows at once -----------------------------------------------------------


def paged_attention_reference(
    q_BQHC: Any,
    pages: Any,
    table_BP: Any,
    len_B: Any,
    start_B: Any,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
):
    """What the operation means, for numpy or jax arrays; see `paged_attention`.

    Computes in the widest of the operands' types, at least float32, so that float64 numpy
    operands give a float64 answer.
    """
    xp = jnp if isinstance(q_BQHC, jax.Array) else np
    K = pages.num_kv_heads
    B, Q, H, C = q_BQHC.shape
    acc = np.result_type(q_BQHC.dtype, np.float32)
    chunk = _read(pages, xp.clip(table_BP, 0, pages.num_pages - 1), C, acc)
    T = table_BP.shape[1] * pages.page_size
    k_BKCT = chunk.k_XRKCS.transpose(0, 2, 3, 1, 4).reshape(B, K, C, T)
    v_BKTC = chunk.v_XRKSC.transpose(0, 2, 1, 3, 4).reshape(B, K, T, C)
    if chunk.k_scale_XRKS is not None:
        k_BKCT = k_BKCT * chunk.k_scale_XRKS.swapaxes(1, 2).reshape(B, K, 1, T)
        v_BKTC = v_BKTC * chunk.v_scale_XRKS.swapaxes(1, 2).reshape(B, K, T, 1)
    q_BQKGC = q_BQHC.reshape(B, Q, K, H // K, C).astype(acc)
    q_BQKGC = q_BQKGC * (C**-0.5 if scale is None else scale)

    last_BQ = start_B[:, None] + xp.arange(Q)[None, :]
    last_BQ = xp.minimum(last_BQ, len_B[:, None] - 1)
    visible_BQT = xp.arange(T)[None, None, :] <= last_BQ[:, :, None]
    if window is not None:
        visible_BQT &= xp.arange(T)[None, None, :] > last_BQ[:, :, None] - window
    seen_BT = visible_BQT.any(axis=1)
    k_BKCT = xp.where(seen_BT[:, None, None, :], k_BKCT, 0)
    v_BKTC = xp.where(seen_BT[:, None, :, None], v_BKTC, 0)
    s_BKGQT = xp.einsum("bqkgc,bkct->bkgqt", q_BQKGC, k_BKCT, **_exactly(xp))
    if soft_cap is not None:
        s_BKGQT = soft_cap * xp.tanh(s_BKGQT / soft_cap)
    s_BKGQT = xp.where(visible_BQT[:, None, None], s_BKGQT, _LOWEST)
    e_BKGQT = xp.exp(s_BKGQT - s_BKGQT.max(axis=-1, keepdims=True))
    e_BKGQT = xp.where(visible_BQT[:, None, None], e_BKGQT, 0)
    sum_BKGQ1 = e_BKGQT.sum(axis=-1, keepdims=True)
    p_BKGQT = e_BKGQT / xp.where(sum_BKGQ1 > 0, sum_BKGQ1, 1)
    o_BQKGC = xp.einsum("bkgqt,bktc->bqkgc", p_BKGQT, v_BKTC, **_exactly(xp))
    return o_BQKGC.reshape(B, Q, H, C).astype(q_BQHC.dtype)


def _exactly(xp: Any) -> dict[str, Any]:
    return {"precision": lax.Precision.HIGHEST} if xp is jnp else {}


class _Chunk(NamedTuple):
    """Some pages of some rows, as both products want them; scales where they are quantised."""

    k_XRKCS: Any
    v_XRKSC: Any
    k_scale_XRKS: Any
    v_scale_XRKS: Any


def _read(pages: Pages, id_XR: Any, C: int, dtype: Any) -> _Chunk:
    """Pages by id, for numpy or jax arrays, as stored but in `dtype`. Ids outside are clipped."""

    def at(pool: Any) -> Any:
        return pool.at[id_XR].get(mode="clip") if isinstance(pool, jax.Array) else pool[id_XR]

    if isinstance(pages, KvPages):
        k_XRKCS, v_XRKSC = at(pages.k_NKCS).astype(dtype), at(pages.v_NKSC).astype(dtype)
        return _Chunk(k_XRKCS, v_XRKSC, None, None)
    kv_XRKSD = at(pages.kv_NKSD).astype(dtype)
    S = pages.page_size
    k_XRKCS, v_XRKSC = kv_XRKSD[..., :C].swapaxes(-1, -2), kv_XRKSD[..., C : 2 * C]
    if pages.scale_NKZ is None:
        return _Chunk(k_XRKCS, v_XRKSC, None, None)
    scale_XRKZ = at(pages.scale_NKZ).astype(dtype)
    return _Chunk(k_XRKCS, v_XRKSC, scale_XRKZ[..., :S], scale_XRKZ[..., S:])


# -- Block path: any platform, any number of queries --------------------------------------------


def _attend_blocks(
    q_BQHC,
    pages: Pages,
    table_BP,
    len_B,
    start_B,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
):
    """Groups of blocks in turn; in each, a running softmax over chunks of pages."""
    B, Q, H, C = q_BQHC.shape
    K = pages.num_kv_heads
    on_cpu = backends.target_platform() == "cpu"
    X = min(B, _GROUP_BLOCKS) if on_cpu else B
    R = max(1, min(table_BP.shape[1], _CHUNK_TOKENS // pages.page_size))

    def padded(x, axis: int, multiple: int):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % multiple)
        return jnp.pad(x, widths)

    q_BKMC = q_BQHC.reshape(B, Q, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)
    q_BKMC = q_BKMC.astype(jnp.float32) * scale
    operands = (q_BKMC, padded(table_BP, 1, R), len_B, start_B)
    groups = [padded(x, 0, X).reshape(-1, X, *x.shape[1:]) for x in operands]

    # Accelerators multiply float32 in fewer bits unless told otherwise; a CPU has no other way.
    exact = q_BQHC.dtype == jnp.float32 and not on_cpu
    precision = lax.Precision.HIGHEST if exact else None
    options = {"R": R, "window": window, "soft_cap": soft_cap, "precision": precision}

    def one_group(group):
        return _attend_group(*group, pages=pages, Q=Q, **options)

    o_BKMC = lax.map(one_group, tuple(groups)).reshape(-1, *q_BKMC.shape[1:])[:B]
    o_BQKGC = o_BKMC.reshape(B, K, H // K, Q, C).transpose(0, 3, 1, 2, 4)
    return o_BQKGC.reshape(B, Q, H, C).astype(q_BQHC.dtype)


def _attend_group(
    q_XKMC,
    table_XP,
    len_X,
    start_X,
    *,
    pages: Pages,
    Q: int,
    R: int,
    window: int | None,
    soft_cap: float | None,
    precision: Any,
):
    """Blocks side by side, as many chunks as the longest of them needs."""
    S = pages.page_size
    G = q_XKMC.shape[2] // Q
    last_XM = jnp.tile(start_X[:, None] + jnp.arange(Q)[None, :], (1, G))
    last_XM = jnp.minimum(last_XM, len_X[:, None] - 1)  # the last key each query sees
    num_chunks = (last_XM.max() + R * S) // (R * S)
    first_chunk = jnp.int32(0)
    if window is not None:
        first_chunk = jnp.maximum(0, last_XM.min() + 1 - window) // (R * S)

    def chunk(j, carry):
        m_XKM1, l_XKM1, o_XKMC = carry
        id_XR = lax.dynamic_slice_in_dim(table_XP, j * R, R, axis=1)
        k_XRKCS, v_XRKSC, k_scale_XRKS, v_scale_XRKS = _read(
            pages, id_XR, q_XKMC.shape[-1], jnp.float32
        )
        at_RS = j * R * S + jnp.arange(R * S, dtype=jnp.int32).reshape(R, S)
        visible_XMRS = at_RS[None, None] <= last_XM[:, :, None, None]
        if window is not None:
            visible_XMRS &= at_RS[None, None] > last_XM[:, :, None, None] - window
        s_XKMRS = jnp.einsum("xkmc,xrkcs->xkmrs", q_XKMC, k_XRKCS, precision=precision)
        if k_scale_XRKS is not None:
            s_XKMRS *= k_scale_XRKS.swapaxes(1, 2)[:, :, None]
        if soft_cap is not None:
            s_XKMRS = soft_cap * jnp.tanh(s_XKMRS / soft_cap)
        s_XKMRS = jnp.where(visible_XMRS[:, None], s_XKMRS, -jnp.inf)
        # `m` starts at the lowest number, not at -inf: -inf - -inf would be NaN.
        new_m_XKM1 = jnp.maximum(m_XKM1, s_XKMRS.max((-2, -1))[..., None])
        p_XKMRS = jnp.exp(s_XKMRS - new_m_XKM1[..., None])
        shrink_XKM1 = jnp.exp(m_XKM1 - new_m_XKM1)
        kept_XRS = at_RS[None] < len_X[:, None, None]
        v_XRKSC = jnp.where(kept_XRS[:, :, None, :, None], v_XRKSC, 0)
        l_XKM1 = l_XKM1 * shrink_XKM1 + p_XKMRS.sum((-2, -1))[..., None]
        if v_scale_XRKS is not None:
            p_XKMRS *= jnp.where(kept_XRS[:, :, None], v_scale_XRKS, 0).swapaxes(1, 2)[:, :, None]
        pv_XKMC = jnp.einsum("xkmrs,xrksc->xkmc", p_XKMRS, v_XRKSC, precision=precision)
        o_XKMC = o_XKMC * shrink_XKM1 + pv_XKMC
        return new_m_XKM1, l_XKM1, o_XKMC

    zero_XKM1 = jnp.zeros((*q_XKMC.shape[:3], 1), jnp.float32)
    start = (zero_XKM1 + _LOWEST, zero_XKM1, jnp.zeros_like(q_XKMC))
    _, l_XKM1, o_XKMC = lax.fori_loop(first_chunk, num_chunks, chunk, start)
    return o_XKMC / jnp.where(l_XKM1 > 0, l_XKM1, 1)
