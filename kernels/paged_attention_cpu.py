"""Decode attention over pages on a CPU: one native kernel, on one thread.

Knows one layer's pages and one query per row; `paged_attention.py` says what is computed. Tensor
parallelism brings more threads. In float32 a row's result has the same bits in any batch, by
construction: every sum runs over the row's own tokens in their order.

Dimension key: B rows  H query heads  K kv heads  G = H / K  C channels per head  N pages in the
pool  S slots per page  P pages per row
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from . import quant
from .cpu_kernel import one_kernel
from .kv_pages import KvPages

# Slots and channels are taken 8 at a time: 8 products are chained in registers between two visits
# to the accumulator. 4 compiles faster, 16 runs no faster (measured, AVX-512).
_UNROLL: Final = 8


def unsupported(*, head_dim: int, page_size: int, dtype: DTypeLike, group: int) -> str | None:
    """Say what of this the kernel cannot do and what it can; None if it can do all of it."""
    del group  # any
    if quant.is_quantised(dtype):
        return f"kv_dtype: got {jnp.dtype(dtype).name!r}; allowed: float32, bfloat16"
    if head_dim % _UNROLL:
        return f"head_dim: got {head_dim}; allowed: multiples of {_UNROLL}"
    if page_size % _UNROLL or page_size & (page_size - 1):
        return f"page_size: got {page_size}; allowed: powers of two from {_UNROLL} on"
    return None


def attend(
    q_B1HC,
    pages: KvPages,
    table_BP,
    len_B,
    start_B,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
):
    """What `paged_attention` means, for blocks of one query."""
    B, _, H, C = q_B1HC.shape
    K = pages.k_NKCS.shape[1]
    q_BKGC = q_B1HC.reshape(B, K, H // K, C).astype(jnp.float32) * scale
    visible_B = jnp.clip(jnp.minimum(len_B, start_B + 1), 0)
    decode = partial(_decode, window=window, soft_cap=soft_cap)
    o_BKGC = one_kernel(decode, q_BKGC, pages, table_BP, visible_B)
    return o_BKGC.reshape(B, 1, H, C).astype(q_B1HC.dtype)


def _decode(q_BKGC, pages: KvPages, table_BP, len_B, *, window: int | None, soft_cap: float | None):
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
            if soft_cap is not None:
                s_GS = lax.tanh(s_GS / soft_cap) * soft_cap
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
