"""Paged attention on TPUs: a Pallas Mosaic kernel over row pages.

Knows one layer's row pages and one batch of query blocks; knows no model, request or scheduler.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  N pages in the pool  S slots per page  P pages per row  D lanes of a stored row
Z = 2S  M = G * Q  T tokens per block of pages, R = T / S pages  E lanes of a query, L of a sum
F blocks of pages in flight

The pool stays in HBM. Query blocks ("rows" here) are taken one per grid step, and their pages in
blocks of T tokens, which `page_ring_tpu` fetches ahead. Blocks are counted from the row's own first
visible page, so that its sums do not depend on its neighbours; pages that no query sees are not
copied.

A token's key and value share a row of D lanes. Where C is a multiple of 128 lanes they are read
apart. Elsewhere nothing is cut: queries are padded with zeros to D lanes, so that q . row = q . k,
and p . rows holds the output in lanes C..2C-1. For 64 channels that fills lanes of the matrix unit
that would be idle otherwise.

A row has *whole lanes*: D is 2C rounded up to a multiple of 128 (`row_lanes`). XLA pads the last
axis in memory to that in any case, and it gives an array whose last axis does not fill its lanes
another layout by default, from which it would copy the whole pool to call this kernel. Scales obey
the same: Z is a multiple of 128, so pages of 8 bits hold 64 or 128 tokens.

Sources: Kwon et al. 2023 (PagedAttention); Milakov and Gimelshein 2018 (running softmax). Fetching
the next row's pages during the last of this one is also in JAX's own TPU paged attention.
"""

from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .backend import target_device_kind
from .block_sizes import TpuBlocks, tpu_blocks
from .kv_pages import RowPages
from .page_ring_tpu import CURSOR, Need, PageRing

HEAD_DIMS: Final = tuple(range(16, 257, 16))
PAGE_SIZES: Final = (16, 32, 64, 128)
_LANES: Final = 128
_LOWEST: Final = float(np.finfo(np.float32).min)
# Of 1 MiB of scalar memory. A table beyond that is given to several calls: a row of it needs 8 KiB
# for 2048 pages, and a call costs microseconds.
_TABLE_BYTES: Final = 512 << 10
_VMEM_BYTES: Final = 48 << 20  # of 64 MiB (v5p) or 128 (v5e, v6e)
_LONGEST_BLOCK: Final = 512  # tokens; beyond that, scores only fill registers


class Sizes(NamedTuple):
    """How a chip is fed: `block` tokens at a time, `ring` such blocks in VMEM, on `cores` cores."""

    block: int
    ring: int
    cores: int


# Those with float8 in hardware. The others compile it too, to integer arithmetic; and so does v6e,
# whose float8 is another than e4m3fn: a block of 512 tokens takes 2340 instructions there, not the
# 880 of bfloat16. So float8 pages save memory on it, but no time; int8 (910) saves both.
_FLOAT8_KINDS: Final = ("TPU v6 lite", "TPU7x")


def row_lanes(head_dim: int) -> int:
    """Return D, the lanes of a stored row: key, value, and what fills them up to whole lanes."""
    return -(-2 * head_dim // _LANES) * _LANES


def unsupported(
    *,
    head_dim: int,
    page_size: int,
    dtype: DTypeLike,
    group: int,
    device_kind: str | None = None,
) -> str | None:
    """Return why pages like these cannot be attended to here, and what can; None when they can.

    Every `group` of query heads per kv head is supported. `device_kind` (None: any) decides on
    float8 alone.
    """
    dtype = jnp.dtype(dtype)
    if head_dim not in HEAD_DIMS:
        return f"head_dim: got {head_dim}; allowed: multiples of 16 up to {HEAD_DIMS[-1]}"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
        return f"dtype: got {dtype}; allowed: float32, bfloat16, int8, float8_e4m3fn"
    allowed = PAGE_SIZES if dtype.itemsize > 1 else PAGE_SIZES[2:]
    if page_size not in allowed:
        sizes = ", ".join(map(str, allowed))
        return f"page_size: got {page_size}; allowed for {dtype} pages on a TPU: {sizes}"
    if dtype == jnp.float8_e4m3fn and device_kind not in (None, *_FLOAT8_KINDS):
        return f"dtype: got {dtype}; {device_kind} has no such type; allowed: bfloat16, int8"
    return None


def sizes_of(blocks: TpuBlocks, pages: RowPages, num_blocks: int) -> Sizes:
    """Return what the table's `blocks` are for these pages and `num_blocks` query blocks.

    A block has whole lanes of scores, so at least 128 tokens, and at most 512.
    """
    _, K, S, D = pages.kv_NKSD.shape
    block = blocks.block_bytes // (K * D * pages.kv_NKSD.dtype.itemsize) // _LANES * _LANES
    return Sizes(
        min(max(block, _LANES, S), _LONGEST_BLOCK), blocks.ring, min(blocks.cores, num_blocks)
    )


def _table_sizes(pages: RowPages, head_dim: int, num_blocks: int) -> Sizes:
    row = tpu_blocks(
        target_device_kind(),
        head_dim=head_dim,
        page_size=pages.page_size,
        dtype=pages.kv_NKSD.dtype,
    )
    return sizes_of(row, pages, num_blocks)


def attend(
    q_BQHC: Float[Array, "B Q H C"],
    pages: RowPages,
    table_BP: Int[Array, "B P"],
    len_B: Int[Array, " B"],
    start_B: Int[Array, " B"],
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
    interpret: bool | pltpu.InterpretParams = False,
    sizes: Sizes | None = None,
) -> Float[Array, "B Q H C"]:
    """Attend from query blocks to pages; see `paged_attention` for what the operands mean.

    `sizes` replaces what `block_sizes` says; its block must be whole pages. Dots take the wider of
    the types of queries and pages, with pages of 8 bits as bfloat16; float32 is not rounded to
    less. With `interpret` the kernel runs on a CPU, in the interpreter that imitates a TPU's
    memories.

    Raises ValueError when stored rows are too short or, compiled, do not have whole lanes.
    """
    B, Q, H, C = q_BQHC.shape
    _, K, _, D = pages.kv_NKSD.shape
    if D < 2 * C or (D % _LANES and not interpret):
        raise ValueError(f"pages on a TPU hold rows of {row_lanes(C)} for {C} channels, got {D}")
    q_BKME = q_BQHC.reshape(B, Q, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)
    if C % _LANES:
        q_BKME = jnp.pad(q_BKME, ((0, 0),) * 3 + ((0, D - C),))
    is_float32 = jnp.float32 in (q_BQHC.dtype, pages.kv_NKSD.dtype)
    compute = jnp.float32 if is_float32 else jnp.bfloat16
    call = partial(
        _call,
        pages=pages,
        num_queries=Q,
        window=window,
        options=_Options(C, soft_cap, C**-0.5 if scale is None else scale, compute),
        sizes=sizes or _table_sizes(pages, C, B),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
    )
    rows = max(1, _TABLE_BYTES // (4 * table_BP.shape[1]))
    parts = [
        call(*(x[at : at + rows] for x in (q_BKME, table_BP, len_B, start_B)))
        for at in range(0, B, rows)
    ]
    o_BKMC = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    o_BQKGC = o_BKMC.reshape(B, K, H // K, Q, C).transpose(0, 3, 1, 2, 4)
    return o_BQKGC.reshape(B, Q, H, C)


class _Options(NamedTuple):
    """What the kernel knows when it is compiled, beside shapes; `compute` is its dots' type."""

    head_dim: int
    soft_cap: float | None
    scale: float
    compute: Any

    @property
    def has_whole_lanes(self) -> bool:
        """Whether keys and values are read apart; else sums have all lanes of a stored row."""
        return self.head_dim % _LANES == 0


def _call(
    q_BKME,
    table_BP,
    len_B,
    start_B,
    *,
    pages: RowPages,
    num_queries: int,
    window: int | None,
    options: _Options,
    sizes: Sizes,
    interpret: Any,
):
    B, K, M, E = q_BKME.shape
    N, _, S, D = pages.kv_NKSD.shape
    P, C = table_BP.shape[1], options.head_dim
    T, F, cores = sizes.block, sizes.ring, min(sizes.cores, B)
    L = C if options.has_whole_lanes else D
    need = Need(B, P, N, S, T, F, cores, num_queries, window)
    pools = [x for x in pages if x is not None]

    def row(core, i, *_):
        b = i * cores + core
        return jnp.where(b < B, b, b - cores), 0, 0, 0  # what is past the end writes nothing anew

    blocks = [pltpu.VMEM((F, K, T, D), pages.kv_NKSD.dtype)]
    if pages.scale_NKZ is not None:
        blocks.append(pltpu.VMEM((F, T // S, K, 2 * S), jnp.float32))
    return pl.pallas_call(
        partial(_kernel, need, options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, pl.cdiv(B, cores)),
            in_specs=[
                pl.BlockSpec((None, K, M, E), row),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in pools),
            ],
            out_specs=pl.BlockSpec((None, K, M, C), row),
            scratch_shapes=[
                *blocks,
                pltpu.SMEM((CURSOR,), jnp.int32),
                pltpu.SemaphoreType.DMA((F,)),
                pltpu.VMEM((K, M, 1), jnp.float32),
                pltpu.VMEM((K, M, 1), jnp.float32),
                pltpu.VMEM((K, M, L), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, M, C), q_BKME.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
            disable_bounds_checks=True,  # page ids are clamped; checks take half of a copy's start
        ),
        # At full tables, an upper bound: how long rows are is known only when it runs. XLA places
        # it between other work by it; `jaxserve compile` counts steps at a stated length instead.
        cost_estimate=pl.CostEstimate(
            flops=4 * B * P * S * K * M * C,
            transcendentals=B * P * S * K * M,
            bytes_accessed=B * P * sum(x.size * x.dtype.itemsize // N for x in pools),
        ),
        interpret=interpret,
        name="paged_attention",
    )(table_BP.reshape(-1), len_B, start_B, q_BKME, *pools)


class _Row(NamedTuple):
    """One row's queries, output and running softmax: peak, sum of weights, weighted sum."""

    q_KME: Any
    o_KMC: Any
    m_KM1: Any
    l_KM1: Any
    acc_KML: Any


def _kernel(need: Need, options: _Options, *refs: Any) -> None:
    """One row: its blocks in order."""
    table_BP, len_B, start_B, q_KME, pool_NKSD, *others = refs
    scale_pool, scale_blocks = None, None
    if len(others) == 9:  # pages with scales
        scale_pool, scale_blocks = others.pop(0), others.pop(2)
    o_KMC, block_FKTD, cursor, copied_F, *softmax = others
    pools, blocks = (pool_NKSD, scale_pool), (block_FKTD, scale_blocks)
    ring = PageRing(need, table_BP, len_B, start_B, *pools, *blocks, cursor, copied_F)
    x = _Row(q_KME, o_KMC, *softmax)
    core = pl.program_id(0)
    b = pl.program_id(1) * need.cores + core

    @pl.when(pl.program_id(1) == 0)
    def _():
        ring.open(core)

    @pl.when(b < need.num_rows)
    def _():
        x.m_KM1[...] = jnp.full(x.m_KM1.shape, _LOWEST, jnp.float32)
        x.l_KM1[...] = jnp.zeros(x.l_KM1.shape, jnp.float32)
        x.acc_KML[...] = jnp.zeros(x.acc_KML.shape, jnp.float32)
        lax.fori_loop(0, ring.num_blocks(b), partial(_attend_block, options, ring, x, b), None)
        at = 0 if options.has_whole_lanes else options.head_dim
        for k in range(x.q_KME.shape[0]):
            l_M1 = x.l_KM1[k]
            o_ML = x.acc_KML[k] / jnp.where(l_M1 > 0, l_M1, 1.0)
            x.o_KMC[k] = o_ML[:, at : at + options.head_dim].astype(x.o_KMC.dtype)


def _attend_block(
    options: _Options, ring: PageRing, x: _Row, b: Any, j: Any, _: None = None
) -> None:
    """Attend to row b's block j, all heads."""
    need = ring.need
    K, M, _ = x.q_KME.shape
    buffer = ring.take(b, j)
    at = ring.position(b, j)  # positions below are counted from here
    start = ring.start_B[b] - at
    last = ring.length(b) - 1 - at
    held = jnp.minimum(last + 1, start + need.num_queries)

    @pl.when(held < need.block)
    def _():
        _clear(ring.block_FKTD, buffer, held)

    token_MT = lax.broadcasted_iota(jnp.int32, (M, need.block), 1)
    query_MT = lax.broadcasted_iota(jnp.int32, (M, need.block), 0)
    query_MT = lax.rem(query_MT, jnp.int32(need.num_queries))
    last_MT = jnp.minimum(start + query_MT, last)
    visible_MT = token_MT <= last_MT
    if need.window is not None:
        visible_MT &= token_MT > last_MT - need.window
    for k, scales in enumerate(_scales(ring, buffer, held, K)):
        _attend_head(options, x, k, ring.block_FKTD.at[buffer, k], visible_MT, scales)


def _clear(block_FKTD: Any, buffer: Any, held: Any) -> None:
    """Put zeros where a block holds no token: what lies there is stale, and 0 * NaN is NaN."""
    for k in range(block_FKTD.shape[1]):
        row_TD = block_FKTD[buffer, k]
        here_TD = lax.broadcasted_iota(jnp.int32, row_TD.shape, 0) < held
        block_FKTD[buffer, k] = jnp.where(here_TD, row_TD, jnp.zeros_like(row_TD))


def _scales(ring: PageRing, buffer: Any, held: Any, K: int) -> list[Any]:
    """Per head, the scales of a block's keys and values, tokens along lanes; or None."""
    if ring.scale_FRKZ is None:
        return [None] * K
    S, T = ring.need.page_size, ring.need.block
    here_KT = lax.broadcasted_iota(jnp.int32, (K, T), 1) < held

    def whole(z: int) -> Any:
        of_pages = [ring.scale_FRKZ[buffer, i, :, z : z + S] for i in range(T // S)]
        return jnp.where(here_KT, jnp.concatenate(of_pages, axis=1), 0.0)

    k_KT, v_KT = whole(0), whole(S)
    return [(k_KT[k : k + 1], v_KT[k : k + 1]) for k in range(K)]


def _attend_head(
    options: _Options, x: _Row, k: int, row_TD: Any, visible_MT: Any, scales: Any
) -> None:
    """One kv head's part of a block: scores, running softmax, weighted sum."""
    C = options.head_dim
    exact = lax.Precision.HIGHEST if options.compute == jnp.float32 else None
    dot = partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
    if options.has_whole_lanes:
        key_TE, value_TL = row_TD[:, :C], row_TD[:, C : 2 * C]
    else:
        key_TE = value_TL = row_TD[...]
    q_ME, key_TE, value_TL = (y.astype(options.compute) for y in (x.q_KME[k], key_TE, value_TL))

    s_MT = dot(q_ME, key_TE, (((1,), (1,)), ((), ()))) * options.scale
    if scales is not None:
        s_MT *= scales[0]
    if options.soft_cap is not None:
        s_MT = jnp.tanh(s_MT / options.soft_cap) * options.soft_cap
    s_MT = jnp.where(visible_MT, s_MT, -jnp.inf)
    # `m` starts at the lowest number, not at -inf: -inf - -inf would be NaN.
    m_M1 = jnp.maximum(x.m_KM1[k], s_MT.max(axis=1, keepdims=True))
    p_MT = jnp.exp(s_MT - m_M1)
    shrink_M1 = jnp.exp(x.m_KM1[k] - m_M1)
    x.m_KM1[k] = m_M1
    x.l_KM1[k] = x.l_KM1[k] * shrink_M1 + p_MT.sum(axis=1, keepdims=True)
    if scales is not None:
        p_MT *= scales[1]
    sum_ML = dot(p_MT.astype(options.compute), value_TL, (((1,), (0,)), ((), ())))
    x.acc_KML[k] = x.acc_KML[k] * shrink_M1 + sum_ML
