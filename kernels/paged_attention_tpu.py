"""Paged attention on TPUs: a Pallas Mosaic kernel that copies pages while it computes.

Knows one layer's row pages and one batch of query blocks; knows no model, request or scheduler.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  N pages in the pool  S slots per page  P pages per row  D lanes of a stored row
Z = 2S  M = G * Q  T tokens per block of pages, R = T / S pages  E lanes of a query, L of a sum
F blocks in flight

The pool stays in HBM. Query blocks ("rows" here) are taken one per grid step. A row's visible
tokens are cut into blocks of T, counted from its own first visible page, so that its sums do not
depend on its neighbours. Blocks pass through a ring of F buffers in VMEM: while one is attended to,
the copies of the F - 1 after it are under way, across the ends of rows, so that many short rows do
not each wait for memory. Pages that no query of the row sees are not copied.

A token's key and value share a row of D lanes. Where C is a multiple of 128 lanes they are read
apart. Elsewhere nothing is cut: queries are padded with zeros to D lanes, so that q . row = q . k,
and p . rows holds the output in lanes C..2C-1. For 64 channels that fills lanes of the matrix unit
that would be idle otherwise.

A row has *whole lanes*: D is 2C rounded up to a multiple of 128 (`row_lanes`). XLA pads the last
axis in memory to that in any case, and it gives an array whose last axis does not fill its lanes
another layout by default, from which it would copy the whole pool to call this kernel. Scales obey
the same: Z is a multiple of 128, so pages of 8 bits hold 64 or 128 tokens.

Sources: Kwon et al. 2023 (PagedAttention); Milakov and Gimelshein 2018 (running softmax). Fetching
the next row's pages during the last of this row is also in JAX's own TPU paged attention.
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

from .kv_pages import RowPages

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


# Per device kind: bytes per block, blocks in the ring, cores that share one program. A block should
# take longer to copy than the kernel's fixed cost per block, about a microsecond, and the ring cover
# the latency of memory. Reasoned from bandwidths, not measured.
_TPU: Final = {
    "TPU v5 lite": (512 << 10, 4, 1),
    "TPU v6 lite": (1 << 20, 4, 1),
    "TPU v5": (1 << 20, 4, 2),
}
_ANY_TPU: Final = (512 << 10, 4, 1)
# e4m3 exists in the matrix units of these; elsewhere each number would be converted bit by bit.
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


def default_sizes(pages: RowPages, num_blocks: int, *, device_kind: str | None = None) -> Sizes:
    """Return the sizes for these pages and `num_blocks` query blocks on one kind of device."""
    _, K, S, D = pages.kv_NKSD.shape
    block_bytes, ring, cores = _TPU.get(device_kind or _device_kind(), _ANY_TPU)
    block = block_bytes // (K * D * pages.kv_NKSD.dtype.itemsize) // _LANES * _LANES
    return Sizes(min(max(block, _LANES, S), _LONGEST_BLOCK), ring, min(cores, num_blocks))


def _device_kind() -> str:
    """What is compiled for: a mesh may name devices that this machine does not have."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""


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

    `sizes.block` must be a multiple of the page size. Dots take the wider of the types of queries
    and pages, with pages of 8 bits as bfloat16; float32 is not rounded to less. With `interpret` the
    kernel runs on a CPU, in the interpreter that imitates a TPU's memories.

    Raises ValueError when stored rows are too short or, compiled, do not have whole lanes.
    """
    B, Q, H, C = q_BQHC.shape
    _, K, _, D = pages.kv_NKSD.shape
    if D < 2 * C or (D % _LANES and not interpret):
        raise ValueError(f"pages on a TPU hold rows of {row_lanes(C)} for {C} channels, got {D}")
    q_BKME = q_BQHC.reshape(B, Q, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)
    if C % _LANES:
        q_BKME = jnp.pad(q_BKME, ((0, 0),) * 3 + ((0, D - C),))
    call = partial(
        _call,
        pages=pages,
        Q=Q,
        C=C,
        options=_Options(window, soft_cap, C**-0.5 if scale is None else scale),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        sizes=sizes or default_sizes(pages, B),
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
    window: int | None
    soft_cap: float | None
    scale: float


class _Shapes(NamedTuple):
    """What the kernel knows when it is compiled; `compute` is the type of its dots."""

    B: int
    Q: int
    K: int
    M: int
    C: int
    N: int
    S: int
    P: int
    T: int
    F: int
    L: int
    cores: int
    compute: Any
    options: _Options


def _call(
    q_BKME, table_BP, len_B, start_B, *, pages: RowPages, Q, C, options, interpret, sizes: Sizes
):
    B, K, M, E = q_BKME.shape
    N, _, S, D = pages.kv_NKSD.shape
    P = table_BP.shape[1]
    stored, narrow = pages.kv_NKSD.dtype, pages.scale_NKZ is not None
    T, F, cores = sizes.block, sizes.ring, min(sizes.cores, B)
    L = D if C % _LANES else C
    compute = jnp.float32 if jnp.float32 in (q_BKME.dtype, stored) else jnp.bfloat16
    shapes = _Shapes(B, Q, K, M, C, N, S, P, T, F, L, cores, compute, options)

    def row(core, i, *_):
        b = i * cores + core
        return jnp.where(b < B, b, b - cores), 0, 0, 0  # what is past the end writes nothing anew

    pools = [x for x in pages if x is not None]
    return pl.pallas_call(
        partial(_kernel, shapes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, pl.cdiv(B, cores)),
            in_specs=[
                pl.BlockSpec((None, K, M, E), row),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in pools),
            ],
            out_specs=pl.BlockSpec((None, K, M, C), row),
            scratch_shapes=[
                pltpu.VMEM((F, K, T, D), stored),
                *([pltpu.VMEM((F, T // S, K, 2 * S), jnp.float32)] if narrow else []),
                pltpu.VMEM((K, M, 1), jnp.float32),
                pltpu.VMEM((K, M, 1), jnp.float32),
                pltpu.VMEM((K, M, L), jnp.float32),
                pltpu.SMEM((len(_Cursor._fields),), jnp.int32),
                pltpu.SemaphoreType.DMA((F,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, M, C), q_BKME.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        # At full tables: how long rows are is not known here.
        cost_estimate=pl.CostEstimate(
            flops=4 * B * P * S * K * M * C,
            transcendentals=B * P * S * K * M,
            bytes_accessed=B * P * sum(x.size * x.dtype.itemsize // N for x in pools),
        ),
        interpret=interpret,
        name="paged_attention",
    )(table_BP.reshape(-1), len_B, start_B, q_BKME, *pools)


class _Refs(NamedTuple):
    """The kernel's memory: scalars, this row's queries, the pool in HBM, output, the ring."""

    table_BP: Any
    len_B: Any
    start_B: Any
    q_KME: Any
    pool_NKSD: Any
    pool_NKZ: Any
    o_KMC: Any
    ring_FKTD: Any
    ring_FRKZ: Any
    m_KM1: Any
    l_KM1: Any
    acc_KML: Any
    cursor: Any
    copied_F: Any


class _Cursor(NamedTuple):
    """Where a core stands: the next block to fetch, and the buffers to fill and to read next."""

    row: int = 0
    block: int = 1
    fill: int = 2
    read: int = 3


_AT: Final = _Cursor()


def _kernel(x: _Shapes, *refs: Any) -> None:
    """One row: its blocks in order, while the ring is kept full with those that come after."""
    if len(refs) < len(_Refs._fields):  # pages without scales
        refs = (*refs[:5], None, *refs[5:7], None, *refs[7:])
    r = _Refs(*refs)
    core = pl.program_id(0)
    b = pl.program_id(1) * x.cores + core

    @pl.when(pl.program_id(1) == 0)
    def _():
        r.cursor[_AT.row] = _row_with_blocks(x, r, core)
        for at in _AT[1:]:
            r.cursor[at] = 0
        for _ in range(x.F - 1):
            _fetch(x, r)

    @pl.when(b < x.B)
    def _():
        r.m_KM1[...] = jnp.full(r.m_KM1.shape, _LOWEST, jnp.float32)
        r.l_KM1[...] = jnp.zeros(r.l_KM1.shape, jnp.float32)
        r.acc_KML[...] = jnp.zeros(r.acc_KML.shape, jnp.float32)
        lax.fori_loop(0, _num_blocks(x, r, b), partial(_block, x, r, b), None)
        for k in range(x.K):
            l_M1 = r.l_KM1[k]
            o_ML = r.acc_KML[k] / jnp.where(l_M1 > 0, l_M1, 1.0)
            at = 0 if x.L == x.C else x.C
            r.o_KMC[k] = o_ML[:, at : at + x.C].astype(r.o_KMC.dtype)


def _page_range(x: _Shapes, r: _Refs, b: Any) -> tuple[Any, Any]:
    """The pages of row b that hold a visible token: the first, and the one after the last."""
    end = jnp.minimum(_length(x, r, b), r.start_B[b] + x.Q)
    if x.options.window is None:
        return 0, pl.cdiv(end, x.S)
    first = jnp.minimum(r.start_B[b], _length(x, r, b) - 1) + 1 - x.options.window
    return jnp.maximum(first, 0) // x.S, pl.cdiv(end, x.S)


def _length(x: _Shapes, r: _Refs, b: Any) -> Any:
    return jnp.minimum(r.len_B[b], x.P * x.S)  # nothing is read past the end of the table


def _num_blocks(x: _Shapes, r: _Refs, b: Any) -> Any:
    first, end = _page_range(x, r, b)
    return pl.cdiv(jnp.maximum(end - first, 0), x.T // x.S)


def _row_with_blocks(x: _Shapes, r: _Refs, b: Any) -> Any:
    """The first row from b on, of this core's, that has anything to fetch; past the end if none."""

    def num_blocks(b: Any) -> Any:
        return _num_blocks(x, r, jnp.minimum(b, x.B - 1))

    def onward(at: tuple[Any, Any]) -> tuple[Any, Any]:
        return at[0] + x.cores, num_blocks(at[0] + x.cores)

    return lax.while_loop(lambda at: (at[0] < x.B) & (at[1] == 0), onward, (b, num_blocks(b)))[0]


def _fetch(x: _Shapes, r: _Refs) -> None:
    """Start the copies of the next block, if any is left, and move the cursor."""
    b, j, slot = (r.cursor[at] for at in _AT[:3])

    @pl.when(b < x.B)
    def _():
        _copies(x, r, b, j, slot, lambda copy: copy.start())
        more = j + 1 < _num_blocks(x, r, b)
        r.cursor[_AT.row] = jnp.where(more, b, _row_with_blocks(x, r, b + x.cores))
        r.cursor[_AT.block] = jnp.where(more, j + 1, 0)
        r.cursor[_AT.fill] = _after(x, slot)


def _after(x: _Shapes, slot: Any) -> Any:
    return jnp.where(slot + 1 < x.F, slot + 1, 0)


def _copies(x: _Shapes, r: _Refs, b: Any, j: Any, slot: Any, act: Any) -> None:
    """Start or await the copies of row b's block j into one buffer: a page, all heads, at a time."""
    first, end = _page_range(x, r, b)
    first += j * (x.T // x.S)

    def one(i: Any, _: None) -> None:
        page = jnp.clip(r.table_BP[b * x.P + first + i], 0, x.N - 1)
        slots = pl.ds(pl.multiple_of(i * x.S, x.S), x.S)
        done = r.copied_F.at[slot]
        act(pltpu.make_async_copy(r.pool_NKSD.at[page], r.ring_FKTD.at[slot, :, slots], done))
        if r.pool_NKZ is not None:
            act(pltpu.make_async_copy(r.pool_NKZ.at[page], r.ring_FRKZ.at[slot, i], done))

    lax.fori_loop(0, jnp.minimum(end - first, x.T // x.S), one, None)


def _block(x: _Shapes, r: _Refs, b: Any, j: Any, _: None) -> None:
    """Attend to row b's block j, once the buffer that the block before it left is refilled."""
    _fetch(x, r)
    slot = r.cursor[_AT.read]
    r.cursor[_AT.read] = _after(x, slot)
    _copies(x, r, b, j, slot, lambda copy: copy.wait())

    at = (_page_range(x, r, b)[0] + j * (x.T // x.S)) * x.S  # position of the block's first token
    last = _length(x, r, b) - 1 - at  # counted from there, as everything below
    held = jnp.minimum(last + 1, r.start_B[b] + x.Q - at)

    @pl.when(held < x.T)
    def _():
        _clear(x, r, slot, held)

    shape_MT = (x.M, x.T)
    token_MT = lax.broadcasted_iota(jnp.int32, shape_MT, 1)
    query_MT = lax.rem(lax.broadcasted_iota(jnp.int32, shape_MT, 0), jnp.int32(x.Q))
    last_MT = jnp.minimum(r.start_B[b] - at + query_MT, last)
    visible_MT = token_MT <= last_MT
    if x.options.window is not None:
        visible_MT &= token_MT > last_MT - x.options.window
    scale_KT, scale_v_KT = _scales(x, r, slot, held)
    for k in range(x.K):
        scales = None if scale_KT is None else (scale_KT[k : k + 1], scale_v_KT[k : k + 1])
        _head(x, r, slot, k, visible_MT, scales)


def _clear(x: _Shapes, r: _Refs, slot: Any, held: Any) -> None:
    """Put zeros where a block holds no token: what lies there is stale, and 0 * NaN is NaN."""
    for k in range(x.K):
        row_TD = r.ring_FKTD[slot, k]
        here_TD = lax.broadcasted_iota(jnp.int32, row_TD.shape, 0) < held
        r.ring_FKTD[slot, k] = jnp.where(here_TD, row_TD, jnp.zeros_like(row_TD))


def _scales(x: _Shapes, r: _Refs, slot: Any, held: Any) -> tuple[Any, Any]:
    """The scales of a block's keys and values, tokens along lanes as in scores; None without."""
    if r.ring_FRKZ is None:
        return None, None
    here_KT = lax.broadcasted_iota(jnp.int32, (x.K, x.T), 1) < held
    return tuple(
        jnp.where(
            here_KT,
            jnp.concatenate(
                [r.ring_FRKZ[slot, i, :, z : z + x.S] for i in range(x.T // x.S)], axis=1
            ),
            0.0,
        )
        for z in (0, x.S)
    )


def _head(x: _Shapes, r: _Refs, slot: Any, k: int, visible_MT: Any, scales: Any) -> None:
    """One kv head's part of a block: scores, running softmax, weighted sum."""
    exact = lax.Precision.HIGHEST if x.compute == jnp.float32 else None
    dot = partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
    if x.L == x.C:
        key_TE, value_TL = r.ring_FKTD[slot, k, :, : x.C], r.ring_FKTD[slot, k, :, x.C :]
    else:
        key_TE = value_TL = r.ring_FKTD[slot, k]
    q_ME, key_TE, value_TL = (y.astype(x.compute) for y in (r.q_KME[k], key_TE, value_TL))

    s_MT = dot(q_ME, key_TE, (((1,), (1,)), ((), ()))) * x.options.scale
    if scales is not None:
        s_MT *= scales[0]
    if x.options.soft_cap is not None:
        s_MT = jnp.tanh(s_MT / x.options.soft_cap) * x.options.soft_cap
    s_MT = jnp.where(visible_MT, s_MT, -jnp.inf)
    # `m` starts at the lowest number, not at -inf: -inf - -inf would be NaN.
    m_M1 = jnp.maximum(r.m_KM1[k], s_MT.max(axis=1, keepdims=True))
    p_MT = jnp.exp(s_MT - m_M1)
    shrink_M1 = jnp.exp(r.m_KM1[k] - m_M1)
    r.m_KM1[k] = m_M1
    r.l_KM1[k] = r.l_KM1[k] * shrink_M1 + p_MT.sum(axis=1, keepdims=True)
    if scales is not None:
        p_MT *= scales[1]
    sum_ML = dot(p_MT.astype(x.compute), value_TL, (((1,), (0,)), ((), ())))
    r.acc_KML[k] = r.acc_KML[k] * shrink_M1 + sum_ML
