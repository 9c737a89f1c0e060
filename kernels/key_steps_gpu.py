"""The step that the GPU's attention kernels share: some query rows of one kv head walk over keys.

Knows one layer's `RowPages`, one row's page table and spans of its keys; does not know how rows are
cut into programs.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  E = C padded to a power of two  N pages in the pool  S slots per page
P pages per row  M query rows of a program, Q * G of one kv head, padded  T keys per step

One program holds M query rows of one kv head and walks over keys, T at a time, with a running
softmax in float32 (Dao 2023; base 2, the scale carries log2(e)). A step finds its page of each key
in the table and copies T rows of C keys and C values, while Triton's pipeline works on an earlier
one. Channels are padded to E for the matrix units, not in memory: a masked lane is no access.
Grouped heads share a key, so M is at least the group and at least 16, the least that a matrix unit
takes: decode wastes arithmetic by it and not a byte.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .kv_pages import RowPages

LOWEST: Final = float(np.finfo(np.float32).min)
_LOG2_E: Final = math.log2(math.e)


@dataclass(frozen=True)
class Op:
    """One call's sizes and options: all that is known when it is traced."""

    B: int
    Q: int
    H: int
    K: int
    C: int
    N: int
    S: int
    P: int
    dtype: Any  # of the products' operands
    window: int | None
    soft_cap: float | None
    scale: float
    interpret: bool

    @property
    def unit(self) -> float:
        """What makes exponents of 2 of the numbers that `_scores` returns."""
        return (self.scale if self.soft_cap is None else self.soft_cap) * _LOG2_E

    @property
    def G(self) -> int:
        return self.H // self.K

    @property
    def E(self) -> int:
        return pl.next_power_of_2(self.C)

    @staticmethod
    def of(q_BQHC, pages: RowPages, table_BP, *, window, soft_cap, scale, interpret) -> "Op":
        """Those of a call with these operands; scale and soft cap are positive.

        Raises ValueError for pages beyond the lowering.
        """
        B, Q, H, C = q_BQHC.shape
        N, K, S, _ = pages.kv_NKSD.shape
        stored = pages.kv_NKSD.dtype
        # The lowering counts offsets in int32 up to 4 GiB: right for wider types, not for bytes.
        if stored.itemsize == 1 and 2**31 <= pages.kv_NKSD.size <= 2**32:
            raise ValueError(
                f"pages: got a pool of {pages.kv_NKSD.size / 2**30:.1f} GiB of {stored.name};"
                " allowed: less than 2 GiB or more than 4 GiB; try another kv_memory_fraction"
            )
        scale = C**-0.5 if scale is None else scale
        wide = jnp.float32 in (q_BQHC.dtype, stored)
        return Op(
            **dict(B=B, Q=Q, H=H, K=K, C=C, N=N, S=S, P=table_BP.shape[1]),
            dtype=jnp.dtype(jnp.float32 if wide else jnp.bfloat16),
            window=window,
            soft_cap=soft_cap,
            scale=scale,
            interpret=interpret,
        )


def load(ref, index: tuple, mask=None):
    """What `ref` holds at broadcast indices; 0, without an access, where `mask` is false."""
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def _load_step(op: Op, T: int, refs, block, kv_head, first, kept_T):
    """Keys, values and their scales at positions first..first+T-1; 0 where `kept_T` is false.

    `first` is a multiple of T, so that a step lies in one page or begins with one.
    """
    kv_ref, scale_ref, table_ref, first_ref = refs
    first_page = first_ref[0]
    step_T = jnp.arange(T, dtype=jnp.int32)
    page = lax.div(first, jnp.int32(op.S))
    if op.S >= T:
        page_T = jnp.full(T, jnp.clip(table_ref[block, page] + first_page, 0, op.N - 1))
        slot_T = lax.rem(first, jnp.int32(op.S)) + step_T
    else:
        page_T = jnp.minimum(page + lax.div(step_T, jnp.int32(op.S)), op.P - 1)
        page_T = jnp.clip(load(table_ref, (block, page_T)) + first_page, 0, op.N - 1)
        slot_T = lax.rem(step_T, jnp.int32(op.S))
    lane_E = jnp.arange(op.E, dtype=jnp.int32)
    mask_TE = None
    if op.E > op.C:
        mask_TE = jnp.broadcast_to((lane_E < op.C)[None, :], (T, op.E))
    if kept_T is not None:
        kept_TE = jnp.broadcast_to(kept_T[:, None], (T, op.E))
        mask_TE = kept_TE if mask_TE is None else kept_TE & mask_TE
    row = (page_T[:, None], kv_head, slot_T[:, None])
    k_TE = load(kv_ref, (*row, lane_E[None, :]), mask_TE).astype(op.dtype)
    v_TE = load(kv_ref, (*row, lane_E[None, :] + op.C), mask_TE).astype(op.dtype)
    if scale_ref is None:
        return k_TE, v_TE, None, None
    k_scale_T = load(scale_ref, (page_T, kv_head, slot_T), kept_T)
    v_scale_T = load(scale_ref, (page_T, kv_head, slot_T + op.S), kept_T)
    return k_TE, v_TE, k_scale_T, v_scale_T


def over_keys(op: Op, T: int, refs, block, kv_head, q_ME, seen, spans):
    """Running softmax over `spans` of keys; returns maximum m_M, sum l_M and weighted values o_ME.

    `refs` are the pool, its scales, the page tables and the page that their ids count from.
    Maxima are exponents of 2.
    `seen` is (first_key, last_M): before the first key nothing is read, and row m sees keys up to
    last_M[m] and within its window (None: every row sees all that is read). A span is (a multiple
    of T, the key after its last, whether these bounds and its end lie within it).
    """
    M = q_ME.shape[0]
    first_key, last_M = seen

    def step(begin, end, masked: bool, j, carry):
        m_M, l_M, o_ME = carry
        first = begin + j * T
        key_T = first + jnp.arange(T, dtype=jnp.int32)
        kept_T = None
        if masked:
            kept_T = key_T < end
            if op.window is not None:
                kept_T &= key_T >= first_key
        k_TE, v_TE, k_scale_T, v_scale_T = _load_step(op, T, refs, block, kv_head, first, kept_T)
        s_MT = _scores(op, q_ME, k_TE, k_scale_T)
        if kept_T is not None:
            s_MT = jnp.where(_visible(op, M, key_T, kept_T, last_M), s_MT, -jnp.inf)
        # `m` starts at the lowest number, not at -inf: -inf - -inf would be NaN. Every weight is
        # taken from the rounded maximum, as the next maximum is: what it is off by cancels out.
        new_m_M = jnp.maximum(m_M, jnp.max(s_MT, axis=1) * op.unit)
        p_MT = _weights(op, s_MT, jnp.broadcast_to(-new_m_M[:, None], s_MT.shape))
        shrink_M = exp2(op, m_M - new_m_M)
        l_M = l_M * shrink_M + jnp.sum(p_MT, axis=1)
        if v_scale_T is not None:
            p_MT *= v_scale_T[None, :]
        o_ME = o_ME * shrink_M[:, None] + _dot(p_MT.astype(op.dtype), v_TE, (1, 0))
        return new_m_M, l_M, o_ME

    carry = (
        jnp.full(M, LOWEST, jnp.float32),
        jnp.zeros(M, jnp.float32),
        jnp.zeros((M, op.E), jnp.float32),
    )
    for begin, end, masked in spans:
        one = partial(step, begin, end, masked)
        carry = lax.fori_loop(0, cdiv(end - begin, T), one, carry)
    return carry


def exp2(op: Op, x):
    """2 ** x, 0 where that is less than 2 ** -126.

    The instruction alone, at most 2 ** -22 of the result off: what CUDA calls exp2 spends three
    more on smaller results.
    """
    return jnp.exp2(x) if op.interpret else _assembled("ex2.approx.ftz.f32 $0, $1;", x)


def _weights(op: Op, s_MT, plus_MT):
    """2 ** (s * unit + plus), in two instructions.

    Triton would make two of the product and the sum alone (jax 0.10.2). Together with `exp2` this
    takes a quarter off a tile's step.
    """
    if op.interpret:
        return jnp.exp2(s_MT * op.unit + plus_MT)
    unit = np.float32(op.unit).view(np.uint32)
    fused = f"fma.rn.f32 $0, $1, 0f{unit:08X}, $2;"
    return _assembled(f"{fused} ex2.approx.ftz.f32 $0, $0;", s_MT, plus_MT)


def _assembled(asm: str, *args):
    """Instructions on float32 numbers of one shape, each number by itself."""
    [result] = plgpu.elementwise_inline_asm(
        asm,
        args=args,
        constraints=",".join(["=f", *"f" * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)],
    )
    return result


def _scores(op: Op, q_ME, k_TE, k_scale_T):
    """Scores in units of `op.unit`, capped if that is asked for."""
    s_MT = _dot(q_ME, k_TE, (1, 1))
    if k_scale_T is not None:
        s_MT *= k_scale_T[None, :]
    if op.soft_cap is None:
        return s_MT
    return jnp.tanh(s_MT * (op.scale / op.soft_cap))


def _visible(op: Op, M: int, key_T, kept_T, last_M):
    visible_MT = jnp.broadcast_to(kept_T[None, :], (M, key_T.shape[0]))
    if last_M is None:
        return visible_MT
    visible_MT &= key_T[None, :] <= last_M[:, None]
    if op.window is not None:
        visible_MT &= key_T[None, :] > last_M[:, None] - op.window
    return visible_MT


def _dot(a, b, contract: tuple[int, int]):
    """float32 sums of products along one axis of each; float32 operands are not cut to TF32."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def cdiv(x, y):
    """ceil(x / y) for x > -y, y > 0; `lax`, because `//` spends instructions on signs."""
    return lax.div(x + (y - 1), jnp.int32(y))


def rows_of_head(op: Op, block, kv_head, row_M):
    """Where rows of one kv head stand in [B, Q, H, C], heads of a query together; which exist.

    Rows that do not exist have places of their own: interpreted, a masked store writes back.
    """
    query_M = queries(op, row_M)
    head_M = kv_head * op.G + row_M - query_M * op.G
    lane_E = jnp.arange(op.E, dtype=jnp.int32)
    exists_ME = (row_M < op.Q * op.G)[:, None] & (lane_E < op.C)[None, :]
    return (block, query_M[:, None], head_M[:, None], lane_E[None, :]), exists_ME


def queries(op: Op, row_M):
    return jnp.minimum(lax.div(row_M, jnp.int32(op.G)), op.Q - 1)


def normalised(l_M, o_ME):
    return o_ME / jnp.where(l_M > 0, l_M, 1.0)[:, None]
