"""Attention from blocks of queries to the paged keys and values of their rows.

Knows one layer's pages and one batch of query blocks; knows no model, request or scheduler. One
operation serves decode (blocks of one query) and prefill (blocks of 16 or 32), and a batch may mix
rows of any length in any order: work follows the tokens that are there, not the longest row.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  N pages in the pool  S slots per page  P pages per row  R pages per chunk
X blocks taken together  M = G * Q

*A row does not see its neighbours.* Every sum runs over the row's own tokens in their order, and
what a longer neighbour adds is an exact zero or is never computed. In float32 a row's result has
the same bits in any batch, for the decode kernel by construction; the dots of the block path go to
a library whose order may depend on Q and C, but not on B or on the other rows' lengths.

*Stale pages are harmless.* Slots past a row's length may hold anything, NaN included: their scores
are replaced, not multiplied by zero, and their values are never read or are replaced too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from . import backend as backends
from .cpu_kernel import one_kernel
from .kv_pages import KvPages

# Slots and channels are taken 8 at a time in the decode kernel: 8 products are chained in registers
# between two visits to the accumulator. 4 compiles faster, 16 runs no faster (measured, AVX-512).
_UNROLL: Final = 8
# Tokens per step of the block path: a score tile of 128 keys stays in the cache.
_CHUNK_TOKENS: Final = 128
# Query blocks per step of the block path: enough for a batched dot, few enough that blocks of
# unlike lengths do not wait for each other.
_GROUP_BLOCKS: Final = 4
_LOWEST: Final = float(np.finfo(np.float32).min)


def paged_attention_reference(
    q_BQHC: Any, pages: Any, table_BP: Any, len_B: Any, start_B: Any, *, window: int | None = None
):
    """What the operation means, for numpy or jax arrays; see `paged_attention`.

    Computes in the widest of the operands' types, at least float32, so that float64 numpy
    operands give a float64 answer.
    """
    xp = jnp if isinstance(q_BQHC, jax.Array) else np
    K, _, S = pages.k_NKCS.shape[1:]
    B, Q, H, C = q_BQHC.shape
    T = table_BP.shape[1] * S
    acc = np.result_type(q_BQHC.dtype, np.float32)
    N = pages.k_NKCS.shape[0]
    id_BP = xp.clip(table_BP, 0, N - 1)
    k_BTKC = pages.k_NKCS[id_BP].transpose(0, 1, 4, 2, 3).reshape(B, T, K, C).astype(acc)
    v_BTKC = pages.v_NKSC[id_BP].transpose(0, 1, 3, 2, 4).reshape(B, T, K, C).astype(acc)
    q_BQKGC = q_BQHC.reshape(B, Q, K, H // K, C).astype(acc) * C**-0.5

    last_BQ = start_B[:, None] + xp.arange(Q)[None, :]
    last_BQ = xp.minimum(last_BQ, len_B[:, None] - 1)
    visible_BQT = xp.arange(T)[None, None, :] <= last_BQ[:, :, None]
    if window is not None:
        visible_BQT &= xp.arange(T)[None, None, :] > last_BQ[:, :, None] - window
    seen_BT = visible_BQT.any(axis=1)
    k_BTKC = xp.where(seen_BT[:, :, None, None], k_BTKC, 0)
    v_BTKC = xp.where(seen_BT[:, :, None, None], v_BTKC, 0)
    s_BKGQT = xp.einsum("bqkgc,btkc->bkgqt", q_BQKGC, k_BTKC)
    s_BKGQT = xp.where(visible_BQT[:, None, None], s_BKGQT, _LOWEST)
    e_BKGQT = xp.exp(s_BKGQT - s_BKGQT.max(axis=-1, keepdims=True))
    e_BKGQT = xp.where(visible_BQT[:, None, None], e_BKGQT, 0)
    sum_BKGQ1 = e_BKGQT.sum(axis=-1, keepdims=True)
    p_BKGQT = e_BKGQT / xp.where(sum_BKGQ1 > 0, sum_BKGQ1, 1)
    o_BQKGC = xp.einsum("bkgqt,btkc->bqkgc", p_BKGQT, v_BTKC)
    return o_BQKGC.reshape(B, Q, H, C).astype(q_BQHC.dtype)


# -- Block path: any platform, any number of queries --------------------------------------------


def _attend_blocks(q_BQHC, pages: KvPages, table_BP, len_B, start_B, *, window: int | None):
    """Groups of blocks in turn; in each, a running softmax over chunks of pages."""
    B, Q, H, C = q_BQHC.shape
    K = pages.k_NKCS.shape[1]
    on_cpu = jax.default_backend() == "cpu"
    X = min(B, _GROUP_BLOCKS) if on_cpu else B
    R = max(1, min(table_BP.shape[1], _CHUNK_TOKENS // pages.page_size))

    def padded(x, axis: int, multiple: int):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % multiple)
        return jnp.pad(x, widths)

    q_BKMC = q_BQHC.reshape(B, Q, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)
    q_BKMC = q_BKMC.astype(jnp.float32) * C**-0.5
    operands = (q_BKMC, padded(table_BP, 1, R), len_B, start_B)
    groups = [padded(x, 0, X).reshape(-1, X, *x.shape[1:]) for x in operands]

    def one_group(group):
        return _attend_group(*group, pages=pages, Q=Q, R=R, window=window)

    o_BKMC = lax.map(one_group, tuple(groups)).reshape(-1, *q_BKMC.shape[1:])[:B]
    o_BQKGC = o_BKMC.reshape(B, K, H // K, Q, C).transpose(0, 3, 1, 2, 4)
    return o_BQKGC.reshape(B, Q, H, C).astype(q_BQHC.dtype)


def _attend_group(
    q_XKMC, table_XP, len_X, start_X, *, pages: KvPages, Q: int, R: int, window: int | None
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
        k_XRKCS = pages.k_NKCS.at[id_XR].get(mode="clip").astype(jnp.float32)
        v_XRKSC = pages.v_NKSC.at[id_XR].get(mode="clip").astype(jnp.float32)
        at_RS = j * R * S + jnp.arange(R * S, dtype=jnp.int32).reshape(R, S)
        visible_XMRS = at_RS[None, None] <= last_XM[:, :, None, None]
        if window is not None:
            visible_XMRS &= at_RS[None, None] > last_XM[:, :, None, None] - window
        s_XKMRS = jnp.einsum("xkmc,xrkcs->xkmrs", q_XKMC, k_XRKCS)
        s_XKMRS = jnp.where(visible_XMRS[:, None], s_XKMRS, -jnp.inf)
        # `m` starts at the lowest number, not at -inf: -inf - -inf would be NaN.
        new_m_XKM1 = jnp.maximum(m_XKM1, s_XKMRS.max((-2, -1))[..., None])
        p_XKMRS = jnp.exp(s_XKMRS - new_m_XKM1[..., None])
        shrink_XKM1 = jnp.exp(m_XKM1 - new_m_XKM1)
        kept_XRS = at_RS[None] < len_X[:, None, None]
        v_XRKSC = jnp.where(kept_XRS[:, :, None, :, None], v_XRKSC, 0)
        l_XKM1 = l_XKM1 * shrink_XKM1 + p_XKMRS.sum((-2, -1))[..., None]
        o_XKMC = o_XKMC * shrink_XKM1 + jnp.einsum("xkmrs,xrksc->xkmc", p_XKMRS, v_XRKSC)
        return new_m_XKM1, l_XKM1, o_XKMC

    zero_XKM1 = jnp.zeros((*q_XKMC.shape[:3], 1), jnp.float32)
    start = (zero_XKM1 + _LOWEST, zero_XKM1, jnp.zeros_like(q_XKMC))
    _, l_XKM1, o_XKMC = lax.fori_loop(first_chunk, num_chunks, chunk, start)
    return o_XKMC / jnp.where(l_XKM1 > 0, l_XKM1, 1)


# -- Decode path for CPUs: one query per row ----------------------------------------------------


def _attend_cpu(q_BQHC, pages: KvPages, table_BP, len_B, start_B, *, window: int | None):
    """One query per row: one native kernel, on one thread; tensor parallelism brings more."""
    B, Q, H, C = q_BQHC.shape
    if Q > 1:
        return _attend_blocks(q_BQHC, pages, table_BP, len_B, start_B, window=window)
    K = pages.k_NKCS.shape[1]
    q_BKGC = q_BQHC.reshape(B, K, H // K, C).astype(jnp.float32) * C**-0.5
    visible_B = jnp.clip(jnp.minimum(len_B, start_B + 1), 0)
    o_BKGC = one_kernel(partial(_decode, window=window), q_BKGC, pages, table_BP, visible_B)
    return o_BKGC.reshape(B, 1, H, C).astype(q_BQHC.dtype)


def _decode(q_BKGC, pages: KvPages, table_BP, len_B, *, window: int | None):
    """Row by row and head by head: all scores, then their softmax while values are summed.

    Written for `one_kernel`: `lax` only, elementwise work in plain loops, no reductions. Sums over
    S or C are chains of 8 products, which keeps pages in vector registers.
    """
    B, K, G, C = q_BKGC.shape
    P, S = table_BP.shape[1], pages.page_size
    slot_GS = lax.broadcasted_iota(jnp.int32, (G, S), 1)
    lowest_GS = jnp.full((G, S), -jnp.inf, jnp.float32)
    take = partial(lax.dynamic_slice, allow_negative_indices=False)
    put = partial(lax.dynamic_update_slice, allow_negative_indices=False)

    def one(row_and_head, carry):
        out_BKGC, s_PGS = carry
        b, k = lax.div(row_and_head, jnp.int32(K)), lax.rem(row_and_head, jnp.int32(K))
        len_ = take(len_B, (b,), (1,))[0]
        q_GC = take(q_BKGC, (b, k, 0, 0), (1, 1, G, C))[0, 0]
        num_pages = lax.div(len_ + (S - 1), jnp.int32(S))
        first_key = jnp.int32(0) if window is None else lax.max(len_ - window, jnp.int32(0))
        first_page = lax.div(first_key, jnp.int32(S))

        def score_page(j, carry):
            s_PGS, m_GS = carry
            page = take(table_BP, (b, j), (1, 1))[0, 0]

            def channels(i, s_GS):
                for c in range(_UNROLL):
                    c = i * _UNROLL + c
                    k_S = take(pages.k_NKCS, (page, k, c, 0), (1, 1, 1, S))[0, 0, 0]
                    q_G = take(q_GC, (0, c), (G, 1))[:, 0]
                    s_GS += q_G[:, None] * k_S[None, :].astype(jnp.float32)
                return s_GS

            s_GS = lax.fori_loop(0, C // _UNROLL, channels, jnp.zeros((G, S), jnp.float32))
            visible_GS = slot_GS < len_ - j * S
            if window is not None:
                visible_GS &= slot_GS >= first_key - j * S
            s_GS = lax.select(visible_GS, s_GS, lowest_GS)
            return put(s_PGS, s_GS[None], (j, 0, 0)), lax.max(m_GS, s_GS)

        s_PGS, m_GS = lax.fori_loop(first_page, num_pages, score_page, (s_PGS, lowest_GS))
        m_GS = lax.broadcast_in_dim(_fold(lax.max, m_GS)[:, 0], (G, S), (0,))

        def sum_page(j, carry):
            l_GS, o_GC = carry
            page = take(table_BP, (b, j), (1, 1))[0, 0]
            p_GS = lax.exp(take(s_PGS, (j, 0, 0), (1, G, S))[0] - m_GS)

            def slots(start, count, o_GC):
                for s in range(count):
                    s = start + s
                    v_C = take(pages.v_NKSC, (page, k, s, 0), (1, 1, 1, C))[0, 0, 0]
                    p_G = take(p_GS, (0, s), (G, 1))[:, 0]
                    o_GC += p_G[:, None] * v_C[None, :].astype(jnp.float32)
                return o_GC

            # Whole blocks, then single slots up to the row's length: stale slots are not read.
            kept = lax.min(len_ - j * S, jnp.int32(S))
            blocks = lax.div(kept, jnp.int32(_UNROLL))
            o_GC = lax.fori_loop(0, blocks, lambda i, o_GC: slots(i * _UNROLL, _UNROLL, o_GC), o_GC)
            o_GC = lax.fori_loop(blocks * _UNROLL, kept, lambda s, o_GC: slots(s, 1, o_GC), o_GC)
            return l_GS + p_GS, o_GC

        nothing = (jnp.zeros((G, S), jnp.float32), jnp.zeros((G, C), jnp.float32))
        l_GS, o_GC = lax.fori_loop(first_page, num_pages, sum_page, nothing)
        l_G1 = _fold(lax.add, l_GS)
        o_GC = o_GC / lax.select(l_G1 > 0, l_G1, lax.full_like(l_G1, 1))
        return put(out_BKGC, o_GC[None, None], (b, k, 0, 0)), s_PGS

    scratch = jnp.zeros((P, G, S), jnp.float32)
    return lax.fori_loop(0, B * K, one, (jnp.zeros_like(q_BKGC), scratch))[0]


def _fold(combine: Callable[..., Any], x_GS):
    """Combine the last axis into one element by halves, without a reduction."""
    while (half := x_GS.shape[-1] // 2) > 0:
        x_GS = combine(x_GS[..., :half], x_GS[..., half:])
    return x_GS


_BACKENDS: Final = {
    "reference": paged_attention_reference,
    "xla": _attend_blocks,
    "cpu": _attend_cpu,
}


def paged_attention(
    q_BQHC: Float[Array, "B Q H C"],
    pages: KvPages,
    table_BP: Int[Array, "B P"],
    len_B: Int[Array, " B"],
    start_B: Int[Array, " B"],
    *,
    window: int | None = None,
    backend: str = "auto",
) -> Float[Array, "B Q H C"]:
    """Attend from blocks of consecutive queries to the pages of their rows; returns out_BQHC.

    Block b belongs to a row that holds `len_B[b]` keys, on the pages of `table_BP[b]` in order, the
    block's own keys included. Its query i stands at position `start_B[b] + i` and sees the keys at
    positions 0..start+i, never past the length; queries at or past the length are padding, and
    what is returned for them is finite and means nothing. A block of length 0 returns zeros.
    With a `window`, position p sees the `window` newest keys up to its own (Beltagy et al. 2020).
    Query head h reads kv head h // G. Scores are scaled by C ** -0.5; the softmax and all sums are
    float32, whatever the types of queries and pages.

    Raises ValueError when sizes disagree or the backend is unknown.
    Source: Kwon et al. 2023 (PagedAttention); the running softmax is Milakov and Gimelshein 2018.
    """
    _, K, C, _ = pages.k_NKCS.shape
    H = q_BQHC.shape[2]
    if q_BQHC.shape[3] != C or H % K:
        raise ValueError(
            f"pages hold {K} kv heads of {C} channels, got {H} query heads of {q_BQHC.shape[3]};"
            " heads must be a multiple of the kv heads, and channels equal"
        )
    attend = _BACKENDS[backends.resolve(backend)]
    return attend(q_BQHC, pages, table_BP, len_B, start_B, window=window)
