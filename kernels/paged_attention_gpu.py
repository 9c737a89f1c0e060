"""Paged attention on GPUs: Pallas through its Triton lowering, for decode and for prompt tiles.

Knows one layer's `RowPages` and one batch of query blocks; `paged_attention` says what the
operation means. Interpreted, the same kernels run on a CPU, slowly.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  E = C padded to a power of two  N pages in the pool  S slots per page
P pages per row  M query rows of a program, Q * G of one kv head, padded  T keys per step
X pieces per row

*The step.* One program holds M query rows of one kv head and walks over keys, T at a time, with a
running softmax in float32 (Dao 2023; base 2, the scale carries log2(e)). A step finds its page of
each key in the table and copies T rows of C keys and C values, while Triton's pipeline works on an
earlier one. Channels are padded to E for the matrix units, not in memory: a masked lane is no
access. Grouped heads share a key, so M is at least the group and at least 16, the least that a
matrix unit takes: decode wastes arithmetic by it and not a byte.

*Decode is bound by memory.* Per row and kv head it must read len * 2C numbers (an H200 reads
4.8 TB/s) and does 4 * len * C * G FLOPs, 2 G per number: far below the 200 FLOPs per byte from
which arithmetic counts. What is left to do is to keep the memory busy. Each row is cut into pieces
of equal size (Flash-Decoding, Dao et al. 2023), a fixed number of programs share all pairs of a
piece and a kv head in turn, and a second kernel joins the pieces of a row. A program finds its
pieces from a running sum over the rows' numbers of pieces: short and empty rows cost nothing, and
no list is made beforehand. 132 multiprocessors hold three programs each, 396 pairs: 25 rows of 512
keys, or two of 8k, with 8 kv heads. Joining moves 8 H C bytes per piece: at least 256 bf16 keys of
G = 4, so 3 % of what is read, and from the L2 cache.

*Tiles are bound by arithmetic.* 4 C FLOPs per query row and key it sees. A program uses the 4 C
bytes of a bf16 key M times, and most programs of a row find them in L2: at M = 128, 60 % of 790
TFLOP/s take 3.7 TB/s of it. So M is Q * G as far as 128, and Q should be 128 / G or more. Only
steps that some row sees in part are masked; late, long blocks start first.

*A row does not see its neighbours.* Its pieces follow from its own length, steps of a piece and
pieces of a row are summed in one order, and the join has room for the most pieces there can be: in
float32 a row's result has the same bits in any batch and any table. *Stale slots are harmless*:
beyond a row's length and before its window nothing is read.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from .backend import target_device_kind
from .block_sizes import DecodeBlocks, GpuBlocks, gpu_blocks
from .kv_pages import RowPages

_LOWEST: Final = float(np.finfo(np.float32).min)
_LOG2_E: Final = math.log2(math.e)
_DTYPES: Final = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def unsupported(*, head_dim: int, page_size: int, dtype: DTypeLike, group: int) -> str | None:
    """Why there is no GPU kernel for these sizes, naming those that have one; None if there is."""
    if head_dim % 16 or not 16 <= head_dim <= 256:
        return f"head_dim: got {head_dim}; allowed: multiples of 16 from 16 to 256"
    if page_size & (page_size - 1) or not 8 <= page_size <= 256:
        return f"page_size: got {page_size}; allowed: powers of two from 8 to 256"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"dtype of pages: got {jnp.dtype(dtype).name}; allowed: {', '.join(_DTYPES)}"
    if not 1 <= group <= 32:
        return f"query heads per kv head: got {group}; allowed: 1 to 32"
    return None


def attend(
    q_BQHC: jax.Array,
    pages: RowPages,
    table_BP: jax.Array,
    len_B: jax.Array,
    start_B: jax.Array,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
    interpret: bool = False,
    blocks: GpuBlocks | None = None,
) -> jax.Array:
    """Attend from blocks of queries to pages, as `paged_attention` says; returns out_BQHC.

    Products are bfloat16 with float32 sums, or float32 throughout (no TF32) when queries or pages
    are float32. `blocks` replaces the block sizes of the table.
    Raises ValueError when `unsupported` has something to say, or the pool cannot be addressed.
    """
    op = _Op.of(q_BQHC, pages, table_BP, window=window, soft_cap=soft_cap, scale=scale)
    if blocks is None:
        blocks = gpu_blocks(
            target_device_kind(),
            head_dim=op.C,
            page_size=op.S,
            dtype=pages.kv_NKSD.dtype,
        )
    run = _decode if op.Q == 1 else _tiles
    return run(op, blocks, interpret, q_BQHC, pages, table_BP, len_B, start_B)


@dataclass(frozen=True)
class _Op:
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

    @property
    def G(self) -> int:
        return self.H // self.K

    @property
    def E(self) -> int:
        return pl.next_power_of_2(self.C)

    @staticmethod
    def of(q_BQHC, pages: RowPages, table_BP, *, window, soft_cap, scale) -> "_Op":
        B, Q, H, C = q_BQHC.shape
        N, K, S, _ = pages.kv_NKSD.shape
        stored = pages.kv_NKSD.dtype
        reason = unsupported(head_dim=C, page_size=S, dtype=stored, group=H // K)
        if reason is not None:
            raise ValueError(reason)
        # The lowering counts offsets in int32 up to 4 GiB: right for wider types, not for bytes.
        if stored.itemsize == 1 and 2**31 <= pages.kv_NKSD.size <= 2**32:
            raise ValueError(
                f"pages: got a pool of {pages.kv_NKSD.size / 2**30:.1f} GiB of {stored.name};"
                " allowed: less than 2 GiB or more than 4 GiB; try another kv_memory_fraction"
            )
        wide = jnp.float32 in (q_BQHC.dtype, stored)
        return _Op(
            **dict(B=B, Q=Q, H=H, K=K, C=C, N=N, S=S, P=table_BP.shape[1]),
            dtype=jnp.dtype(jnp.float32 if wide else jnp.bfloat16),
            window=window,
            soft_cap=soft_cap,
            scale=C**-0.5 if scale is None else scale,
        )


# -- The step, for both kernels ------------------------------------------------------------------


def _load(ref, index: tuple, mask=None):
    """What `ref` holds at broadcast indices; 0, without an access, where `mask` is false."""
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def _load_step(op: _Op, T: int, refs, block, kv_head, first, kept_T):
    """Keys, values and their scales at positions first..first+T-1; 0 where `kept_T` is false.

    `first` is a multiple of T, so that a step lies in one page or begins with one.
    """
    kv_ref, scale_ref, table_ref = refs
    step_T = jnp.arange(T, dtype=jnp.int32)
    page = lax.div(first, jnp.int32(op.S))
    if op.S >= T:
        page_T = jnp.full(T, jnp.clip(table_ref[block, page], 0, op.N - 1))
        slot_T = lax.rem(first, jnp.int32(op.S)) + step_T
    else:
        page_T = jnp.minimum(page + lax.div(step_T, jnp.int32(op.S)), op.P - 1)
        page_T = jnp.clip(_load(table_ref, (block, page_T)), 0, op.N - 1)
        slot_T = lax.rem(step_T, jnp.int32(op.S))
    lane_E = jnp.arange(op.E, dtype=jnp.int32)
    mask_TE = None
    if op.E > op.C:
        mask_TE = jnp.broadcast_to((lane_E < op.C)[None, :], (T, op.E))
    if kept_T is not None:
        kept_TE = jnp.broadcast_to(kept_T[:, None], (T, op.E))
        mask_TE = kept_TE if mask_TE is None else kept_TE & mask_TE
    row = (page_T[:, None], kv_head, slot_T[:, None])
    k_TE = _load(kv_ref, (*row, lane_E[None, :]), mask_TE).astype(op.dtype)
    v_TE = _load(kv_ref, (*row, lane_E[None, :] + op.C), mask_TE).astype(op.dtype)
    if scale_ref is None:
        return k_TE, v_TE, None, None
    k_scale_T = _load(scale_ref, (page_T, kv_head, slot_T), kept_T)
    v_scale_T = _load(scale_ref, (page_T, kv_head, slot_T + op.S), kept_T)
    return k_TE, v_TE, k_scale_T, v_scale_T


def _over_keys(op: _Op, T: int, refs, block, kv_head, q_ME, seen, spans):
    """Running softmax over `spans` of keys; returns maximum m_M, sum l_M and weighted values o_ME.

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
        # `m` starts at the lowest number, not at -inf: -inf - -inf would be NaN.
        new_m_M = jnp.maximum(m_M, jnp.max(s_MT, axis=1))
        p_MT = jnp.exp2(s_MT - new_m_M[:, None])
        shrink_M = jnp.exp2(m_M - new_m_M)
        l_M = l_M * shrink_M + jnp.sum(p_MT, axis=1)
        if v_scale_T is not None:
            p_MT *= v_scale_T[None, :]
        o_ME = o_ME * shrink_M[:, None] + _dot(p_MT.astype(op.dtype), v_TE, (1, 0))
        return new_m_M, l_M, o_ME

    carry = (
        jnp.full(M, _LOWEST, jnp.float32),
        jnp.zeros(M, jnp.float32),
        jnp.zeros((M, op.E), jnp.float32),
    )
    for begin, end, masked in spans:
        one = partial(step, begin, end, masked)
        carry = lax.fori_loop(0, _cdiv(end - begin, T), one, carry)
    return carry


def _scores(op: _Op, q_ME, k_TE, k_scale_T):
    """Scaled and capped scores, in units of log 2."""
    s_MT = _dot(q_ME, k_TE, (1, 1))
    if k_scale_T is not None:
        s_MT *= k_scale_T[None, :]
    if op.soft_cap is None:
        return s_MT * (op.scale * _LOG2_E)
    return jnp.tanh(s_MT * (op.scale / op.soft_cap)) * (op.soft_cap * _LOG2_E)


def _visible(op: _Op, M: int, key_T, kept_T, last_M):
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


def _cdiv(x, y):
    """ceil(x / y) for x > -y, y > 0; `lax`, because `//` spends instructions on signs."""
    return lax.div(x + (y - 1), jnp.int32(y))


def _rows(op: _Op, block, kv_head, row_M):
    """Where rows of one kv head stand in [B, Q, H, C], heads of a query together; which exist.

    Rows that do not exist have places of their own: interpreted, a masked store writes back.
    """
    query_M = _queries(op, row_M)
    head_M = kv_head * op.G + row_M - query_M * op.G
    lane_E = jnp.arange(op.E, dtype=jnp.int32)
    exists_ME = (row_M < op.Q * op.G)[:, None] & (lane_E < op.C)[None, :]
    return (block, query_M[:, None], head_M[:, None], lane_E[None, :]), exists_ME


def _queries(op: _Op, row_M):
    return jnp.minimum(lax.div(row_M, jnp.int32(op.G)), op.Q - 1)


def _normalised(l_M, o_ME):
    return o_ME / jnp.where(l_M > 0, l_M, 1.0)[:, None]


# -- Tiles: several queries per row --------------------------------------------------------------


def _tiles(op: _Op, blocks: GpuBlocks, interpret: bool, q_BQHC, pages, table_BP, len_B, start_B):
    tile = blocks.tile
    M = min(tile.rows, max(16, pl.next_power_of_2(op.Q * op.G)))
    return pl.pallas_call(
        partial(_tile_kernel, op, M, tile.step_keys),
        grid=(pl.cdiv(op.Q * op.G, M), op.K, op.B),  # on a GPU the first axis runs fastest
        out_shape=jax.ShapeDtypeStruct(q_BQHC.shape, q_BQHC.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="paged_attention_tiles",
    )(q_BQHC, pages.kv_NKSD, pages.scale_NKZ, table_BP, len_B, start_B)


def _tile_kernel(
    op: _Op, M: int, T: int, q_ref, kv_ref, scale_ref, table_ref, len_ref, start_ref, out_ref
):
    """M query rows of one kv head and block, over all keys that any of them sees."""
    kv_head = pl.program_id(1)
    block = op.B - 1 - pl.program_id(2)
    row_M = pl.program_id(0) * M + jnp.arange(M, dtype=jnp.int32)
    at, exists_ME = _rows(op, block, kv_head, row_M)
    q_ME = _load(q_ref, at, exists_ME).astype(op.dtype)

    length = jnp.minimum(len_ref[block], op.P * op.S)
    query_M = _queries(op, row_M)
    last_M = jnp.minimum(start_ref[block] + query_M, length - 1)
    lowest, highest = jnp.min(last_M), jnp.max(last_M)
    # Rows that stand past the length are padding; a program with no other reads nothing.
    is_used = start_ref[block] + jnp.min(query_M) < length
    end = jnp.where(is_used, highest + 1, 0)
    first_key, whole_begin = jnp.int32(0), jnp.int32(0)
    if op.window is not None:
        first_key = jnp.maximum(lowest + 1 - op.window, 0)
        whole_begin = _cdiv(jnp.maximum(highest + 1 - op.window, 0), T) * T
    begin = lax.div(first_key, jnp.int32(T)) * T
    whole_begin = jnp.minimum(whole_begin, end)
    whole_end = jnp.maximum(lax.div(jnp.minimum(lowest + 1, end), jnp.int32(T)) * T, whole_begin)
    spans = [(whole_begin, whole_end, False), (whole_end, end, True)]
    if op.window is not None:
        spans.insert(0, (begin, whole_begin, True))
    refs = (kv_ref, scale_ref, table_ref)
    _, l_M, o_ME = _over_keys(op, T, refs, block, kv_head, q_ME, (first_key, last_M), spans)
    plgpu.store(out_ref.at[at], _normalised(l_M, o_ME).astype(out_ref.dtype), mask=exists_ME)


# -- Decode: one query per row, its keys in pieces ------------------------------------------------


def _decode(op: _Op, blocks: GpuBlocks, interpret: bool, q_BQHC, pages, table_BP, len_B, start_B):
    decode = blocks.decode
    X = min(decode.most_pieces, pl.cdiv(op.P * op.S, decode.piece_keys))
    programs = min(decode.programs, op.B * op.K * X)
    params = plgpu.CompilerParams(num_warps=decode.num_warps, num_stages=decode.num_stages)
    call = partial(
        pl.pallas_call,
        partial(_decode_kernel, op, decode, programs),
        grid=(programs,),
        compiler_params=params,
        interpret=interpret,
        name="paged_attention_decode",
    )
    operands = (q_BQHC, pages.kv_NKSD, pages.scale_NKZ, table_BP, len_B, start_B)
    out = jax.ShapeDtypeStruct(q_BQHC.shape, q_BQHC.dtype)
    part_BXH = jax.ShapeDtypeStruct((op.B, X, op.H), jnp.float32)
    part_BXHC = jax.ShapeDtypeStruct((op.B, X, op.H, op.C), jnp.float32)
    parts = call(out_shape=(part_BXH, part_BXH, part_BXHC))(*operands)
    return pl.pallas_call(
        partial(_join_kernel, op, decode),
        grid=(op.H, op.B),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_attention_join",
    )(*parts, len_B, start_B)


class _Cut(NamedTuple):
    """A row's keys, and the pieces they are worked on in: functions of the row's length alone."""

    first_key: Any
    end: Any
    begin: Any  # of the first piece, a multiple of T
    piece_keys: Any  # a multiple of T
    num_pieces: Any


def _cut(op: _Op, decode: DecodeBlocks, length, start) -> _Cut:
    """How to cut rows of these lengths; scalars or vectors."""
    T = decode.step_keys
    end = jnp.clip(jnp.minimum(length, start + 1), 0, op.P * op.S)
    first_key = jnp.zeros_like(end) if op.window is None else jnp.maximum(end - op.window, 0)
    begin = lax.div(first_key, jnp.full_like(end, T)) * T
    even = _cdiv(end - begin, decode.most_pieces * T) * T
    piece_keys = jnp.maximum(even, decode.piece_keys)
    return _Cut(
        first_key, end, begin, piece_keys, lax.div(end - begin + piece_keys - 1, piece_keys)
    )


def _decode_kernel(op: _Op, decode: DecodeBlocks, programs: int, *refs):
    """Every `programs`-th pair of a piece and a kv head, over all rows."""
    q_ref, kv_ref, scale_ref, table_ref, len_ref, start_ref, m_ref, l_ref, o_ref = refs
    row_B = jnp.arange(pl.next_power_of_2(op.B), dtype=jnp.int32)
    exists_B = row_B < op.B
    lengths = (_load(ref, (row_B,), exists_B) for ref in (len_ref, start_ref))
    until_B = jnp.cumsum(_cut(op, decode, *lengths).num_pieces)
    num_pairs = jnp.max(until_B) * op.K
    program = pl.program_id(0)
    M = max(16, pl.next_power_of_2(op.G))
    head_M = jnp.arange(M, dtype=jnp.int32)

    def one_pair(turn, carry):
        pair = program + turn * programs
        nth, kv_head = lax.div(pair, jnp.int32(op.K)), lax.rem(pair, jnp.int32(op.K))
        done_B = until_B <= nth
        row = jnp.sum(done_B.astype(jnp.int32))
        piece = nth - jnp.max(jnp.where(done_B, until_B, 0))
        cut = _cut(op, decode, len_ref[row], start_ref[row])
        begin = cut.begin + piece * cut.piece_keys
        span = (begin, jnp.minimum(begin + cut.piece_keys, cut.end), True)
        at, exists_ME = _rows(op, row, kv_head, head_M)
        q_ME = _load(q_ref, at, exists_ME).astype(op.dtype)
        m_M, l_M, o_ME = _over_keys(
            op,
            decode.step_keys,
            (kv_ref, scale_ref, table_ref),
            row,
            kv_head,
            q_ME,
            (cut.first_key, None),
            [span],
        )
        own_M = (row, piece, kv_head * op.G + head_M)
        plgpu.store(m_ref.at[own_M], m_M, mask=head_M < op.G)
        plgpu.store(l_ref.at[own_M], l_M, mask=head_M < op.G)
        _, _, head_M1, lane_1E = at
        plgpu.store(o_ref.at[row, piece, head_M1, lane_1E], o_ME, mask=exists_ME)
        return carry

    lax.fori_loop(0, _cdiv(num_pairs - program, programs), one_pair, 0)


def _join_kernel(op: _Op, decode: DecodeBlocks, m_ref, l_ref, o_ref, len_ref, start_ref, out_ref):
    """The pieces of one row and head, weighted by what each holds of the softmax.

    Always as wide as the most pieces there can be: the order of the sum must not depend on P.
    """
    head, row = pl.program_id(0), pl.program_id(1)
    X = decode.most_pieces
    num_pieces = _cut(op, decode, len_ref[row], start_ref[row]).num_pieces
    piece_X = jnp.arange(X, dtype=jnp.int32)
    lane_E = jnp.arange(op.E, dtype=jnp.int32)
    exists_X, exists_E = piece_X < num_pieces, lane_E < op.C
    m_X = jnp.where(exists_X, _load(m_ref, (row, piece_X, head), exists_X), _LOWEST)
    weight_X = jnp.exp2(m_X - jnp.max(m_X))
    sum_ = jnp.sum(weight_X * _load(l_ref, (row, piece_X, head), exists_X))
    exists_XE = exists_X[:, None] & exists_E[None, :]
    o_XE = _load(o_ref, (row, piece_X[:, None], head, lane_E[None, :]), exists_XE)
    o_E = jnp.sum(weight_X[:, None] * o_XE, axis=0) / jnp.where(sum_ > 0, sum_, 1.0)
    plgpu.store(out_ref.at[row, 0, head, lane_E], o_E.astype(out_ref.dtype), mask=exists_E)
