"""Paged attention on GPUs: Pallas through its Triton lowering, for decode and for prompt tiles.

Knows one layer's `RowPages` and one batch of query blocks; `paged_attention` says what the
operation means. Interpreted, the same kernels run on a CPU, slowly.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  E = C padded to a power of two  N pages in the pool  S slots per page
P pages per row  M query rows of a program, Q * G of one kv head, padded  T keys per step
X pieces per row

*The step* that both kernels repeat, T keys of one kv head, is in `key_steps_gpu`.

*Decode is bound by memory.* Per row and kv head it must read len * 2C numbers (an H200 reads 4.8
TB/s) and does 4 * len * C * G FLOPs, 2 G per number: far below the 200 FLOPs per byte from which
arithmetic counts. 64 bf16 keys at C = 128 take 1650 cycles of a multiprocessor's share of the
memory, and 354 instructions of one warp per scheduler, as compiled for an H200. What is left to do
is to keep the memory busy. Each row is cut into pieces of equal size (Flash-Decoding, Dao et al.
2023), a fixed number of programs share all pairs of a piece and a kv head in turn, and a second
kernel joins the pieces of a row. A program finds its pieces from a running sum over the rows'
numbers of pieces: short and empty rows cost nothing, and no list is made beforehand. 132
multiprocessors hold three programs each, 396 pairs: 25 rows of 512 keys, or two of 8k, with 8 kv
heads. Joining moves 8 H C bytes per piece: at least 256 bf16 keys of G = 4, so 3 % of what is read,
and from the L2 cache.

*Tiles are bound by arithmetic.* 4 C FLOPs per query row and key it sees. A program uses the 4 C
bytes of a bf16 key M times, and most programs of a row find them in L2: at M = 128, 60 % of 790
TFLOP/s take 3.7 TB/s of it. So M is Q * G as far as 128, and Q should be 128 / G or more. 128 keys
at C = 128 take 2050 cycles of the matrix unit and, as compiled for an H200, 650 instructions of
each of two warps per scheduler, 1300 cycles: together 61 % of its peak, if neither hides any of the
other. Only steps that some row sees in part are masked; late, long blocks start first.

*A row does not see its neighbours.* Its pieces follow from its own length, steps of a piece and
pieces of a row are summed in one order, and the join has room for the most pieces there can be: in
float32 a row's result has the same bits in any batch and any table. *Stale slots are harmless*:
beyond a row's length and before its window nothing is read.
"""

from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from .backend import target_device_kind
from .block_sizes import DecodeBlocks, GpuBlocks, gpu_blocks
from .key_steps_gpu import (
    LOWEST,
    Op,
    cdiv,
    exp2,
    load,
    normalised,
    over_keys,
    queries,
    rows_of_head,
)
from .kv_pages import RowPages

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
    first_page: jax.Array | int = 0,
    interpret: bool = False,
    blocks: GpuBlocks | None = None,
) -> jax.Array:
    """Attend from blocks of queries to pages, as `paged_attention` says; returns out_BQHC.

    Ids of pages are shifted where they are read: shifted tables of each layer would be written and
    read at each step.

    Products are bfloat16 with float32 sums, or float32 throughout (no TF32) when queries or pages
    are float32. `blocks` replaces the block sizes of the table.
    Raises ValueError when `unsupported` has something to say, or the pool cannot be addressed.
    """
    reason = unsupported(
        head_dim=q_BQHC.shape[3],
        page_size=pages.page_size,
        dtype=pages.kv_NKSD.dtype,
        group=q_BQHC.shape[2] // pages.num_kv_heads,
    )
    if reason is not None:
        raise ValueError(reason)
    options = {"window": window, "soft_cap": soft_cap, "scale": scale, "interpret": interpret}
    op = Op.of(q_BQHC, pages, table_BP, **options)
    if blocks is None:
        blocks = gpu_blocks(
            target_device_kind(),
            head_dim=op.C,
            page_size=op.S,
            dtype=pages.kv_NKSD.dtype,
        )
    run = _decode if op.Q == 1 else _tiles
    first_1 = jnp.asarray(first_page, jnp.int32).reshape(1)
    kv = (pages.kv_NKSD, pages.scale_NKZ, table_BP, first_1)
    return run(op, blocks, q_BQHC, kv, len_B, start_B)


# -- Tiles: several queries per row --------------------------------------------------------------


def _tiles(op: Op, blocks: GpuBlocks, q_BQHC, kv, len_B, start_B):
    tile = blocks.tile
    M = min(tile.rows, max(16, pl.next_power_of_2(op.Q * op.G)))
    return pl.pallas_call(
        partial(_tile_kernel, op, M, tile.step_keys),
        grid=(pl.cdiv(op.Q * op.G, M), op.K, op.B),  # on a GPU the first axis runs fastest
        out_shape=jax.ShapeDtypeStruct(q_BQHC.shape, q_BQHC.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=op.interpret,
        name="paged_attention_tiles",
    )(q_BQHC, *kv, len_B, start_B)


def _tile_kernel(op: Op, M: int, T: int, q_ref, *refs):
    """M query rows of one kv head and block, over all keys that any of them sees."""
    *kv_refs, len_ref, start_ref, out_ref = refs
    kv_head = pl.program_id(1)
    block = op.B - 1 - pl.program_id(2)
    row_M = pl.program_id(0) * M + jnp.arange(M, dtype=jnp.int32)
    at, exists_ME = rows_of_head(op, block, kv_head, row_M)
    q_ME = load(q_ref, at, exists_ME).astype(op.dtype)

    length = jnp.minimum(len_ref[block], op.P * op.S)
    query_M = queries(op, row_M)
    last_M = jnp.minimum(start_ref[block] + query_M, length - 1)
    lowest, highest = jnp.min(last_M), jnp.max(last_M)
    # Rows that stand past the length are padding; a program with no other reads nothing.
    is_used = start_ref[block] + jnp.min(query_M) < length
    end = jnp.where(is_used, highest + 1, 0)
    first_key, whole_begin = jnp.int32(0), jnp.int32(0)
    if op.window is not None:
        first_key = jnp.maximum(lowest + 1 - op.window, 0)
        whole_begin = cdiv(jnp.maximum(highest + 1 - op.window, 0), T) * T
    begin = lax.div(first_key, jnp.int32(T)) * T
    whole_begin = jnp.minimum(whole_begin, end)
    whole_end = jnp.maximum(lax.div(jnp.minimum(lowest + 1, end), jnp.int32(T)) * T, whole_begin)
    spans = [(whole_begin, whole_end, False), (whole_end, end, True)]
    if op.window is not None:
        spans.insert(0, (begin, whole_begin, True))
    _, l_M, o_ME = over_keys(op, T, kv_refs, block, kv_head, q_ME, (first_key, last_M), spans)
    plgpu.store(out_ref.at[at], normalised(l_M, o_ME).astype(out_ref.dtype), mask=exists_ME)


# -- Decode: one query per row, its keys in pieces ------------------------------------------------


def _decode(op: Op, blocks: GpuBlocks, q_BQHC, kv, len_B, start_B):
    decode = blocks.decode
    X = min(decode.most_pieces, pl.cdiv(op.P * op.S, decode.piece_keys))
    programs = min(decode.programs, op.B * op.K * X)
    params = plgpu.CompilerParams(num_warps=decode.num_warps, num_stages=decode.num_stages)
    call = partial(
        pl.pallas_call,
        partial(_decode_kernel, op, decode, programs),
        grid=(programs,),
        compiler_params=params,
        interpret=op.interpret,
        name="paged_attention_decode",
    )
    out = jax.ShapeDtypeStruct(q_BQHC.shape, q_BQHC.dtype)
    part_BXH = jax.ShapeDtypeStruct((op.B, X, op.H), jnp.float32)
    part_BXHC = jax.ShapeDtypeStruct((op.B, X, op.H, op.C), jnp.float32)
    parts = call(out_shape=(part_BXH, part_BXH, part_BXHC))(q_BQHC, *kv, len_B, start_B)
    return pl.pallas_call(
        partial(_join_kernel, op, decode),
        grid=(op.H, op.B),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=op.interpret,
        name="paged_attention_join",
    )(*parts, len_B, start_B)


class _Cut(NamedTuple):
    """A row's keys, and the pieces they are worked on in: functions of the row's length alone."""

    first_key: Any
    end: Any
    begin: Any  # of the first piece, a multiple of T
    piece_keys: Any  # a multiple of T
    num_pieces: Any


def _cut(op: Op, decode: DecodeBlocks, length, start) -> _Cut:
    """How to cut rows of these lengths; scalars or vectors."""
    T = decode.step_keys
    end = jnp.clip(jnp.minimum(length, start + 1), 0, op.P * op.S)
    first_key = jnp.zeros_like(end) if op.window is None else jnp.maximum(end - op.window, 0)
    begin = lax.div(first_key, jnp.full_like(end, T)) * T
    even = cdiv(end - begin, decode.most_pieces * T) * T
    piece_keys = jnp.maximum(even, decode.piece_keys)
    return _Cut(
        first_key, end, begin, piece_keys, lax.div(end - begin + piece_keys - 1, piece_keys)
    )


def _decode_kernel(op: Op, decode: DecodeBlocks, programs: int, *refs):
    """Every `programs`-th pair of a piece and a kv head, over all rows."""
    q_ref, *kv_refs, len_ref, start_ref, m_ref, l_ref, o_ref = refs
    row_B = jnp.arange(pl.next_power_of_2(op.B), dtype=jnp.int32)
    exists_B = row_B < op.B
    lengths = (load(ref, (row_B,), exists_B) for ref in (len_ref, start_ref))
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
        at, exists_ME = rows_of_head(op, row, kv_head, head_M)
        q_ME = load(q_ref, at, exists_ME).astype(op.dtype)
        m_M, l_M, o_ME = over_keys(
            op,
            decode.step_keys,
            kv_refs,
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

    lax.fori_loop(0, cdiv(num_pairs - program, programs), one_pair, 0)


def _join_kernel(op: Op, decode: DecodeBlocks, m_ref, l_ref, o_ref, len_ref, start_ref, out_ref):
    """The pieces of one row and head, weighted by what each holds of the softmax.

    Always as wide as the most pieces there can be: the order of the sum must not depend on P.
    """
    head, row = pl.program_id(0), pl.program_id(1)
    X = decode.most_pieces
    num_pieces = _cut(op, decode, len_ref[row], start_ref[row]).num_pieces
    piece_X = jnp.arange(X, dtype=jnp.int32)
    lane_E = jnp.arange(op.E, dtype=jnp.int32)
    exists_X, exists_E = piece_X < num_pieces, lane_E < op.C
    m_X = jnp.where(exists_X, load(m_ref, (row, piece_X, head), exists_X), LOWEST)
    weight_X = exp2(op, m_X - jnp.max(m_X))
    sum_ = jnp.sum(weight_X * load(l_ref, (row, piece_X, head), exists_X))
    exists_XE = exists_X[:, None] & exists_E[None, :]
    o_XE = load(o_ref, (row, piece_X[:, None], head, lane_E[None, :]), exists_XE)
    o_E = jnp.sum(weight_X[:, None] * o_XE, axis=0) / jnp.where(sum_ > 0, sum_, 1.0)
    plgpu.store(out_ref.at[row, 0, head, lane_E], o_E.astype(out_ref.dtype), mask=exists_E)
