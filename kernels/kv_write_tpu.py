"""Writing keys and values into pages on a TPU, in place: a Pallas Mosaic kernel.

Knows row pages and where each token goes; does not know how keys and values become stored numbers.

Dimension key: T tokens  U tokens per grid step  K kv heads  D lanes of a stored row  Z = 2S
N pages in the pool  S slots per page  V slots per group

Memory is tiled: a copy moves whole groups of V neighbouring slots (8 of 32 bits, 16 of 16, 32 of
8). So a token's group is fetched, changed in VMEM and stored again, all heads at once. Neighbouring
tokens of one group, as a prompt has them, form a *run* and share one fetch; the copies of all runs
of a grid step are under way at once. Scales, whose slots lie along lanes, go by whole pages.

XLA's scatter is no substitute. From a scatter of [K, D] windows it derives another layout for the
pool and copies it whole before and after; said as a scatter of single rows that does not happen
for 16 and 32 bits, but still does for 8 (libtpu 0.0.51).
"""

import math
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from .kv_pages import RowPages

_STEP_BYTES: Final = 4 << 20  # of VMEM for the groups of one grid step
_MOST_TOKENS: Final = 64  # per grid step: enough copies at once to hide the latency of memory


def write(
    pages: RowPages,
    row_TKD: Shaped[Array, "T K D"],
    scale_TK2: Float[Array, "T K 2"] | None,
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> RowPages:
    """Store token t's row and scales at slot `slot_T[t]` of page `page_T[t]`, in place.

    Rows are of the pages' type. A page id outside 0..N-1 drops the write. No two tokens may share a
    slot, and tokens that share a page must stand next to each other, as those of one prompt do.
    """
    interpret = pltpu.InterpretParams() if interpret is True else interpret
    S, stored = pages.page_size, pages.kv_NKSD.dtype
    store = partial(_store, page_T=page_T, slot_T=slot_T, interpret=interpret)
    kv_NKSD = store(pages.kv_NKSD, row_TKD, _Group(S, min(S, 32 // stored.itemsize), _put_row))
    if pages.scale_NKZ is None:
        return RowPages(kv_NKSD, None)
    return RowPages(kv_NKSD, store(pages.scale_NKZ, scale_TK2, _Group(S, S, _put_scales)))


class _Group(NamedTuple):
    """What one copy moves: `size` of a page's `page_size` slots; `put` changes one slot of it."""

    page_size: int
    size: int
    put: Any


def _put_row(group_UKVD: Any, new_UKD: Any, run: Any, u: Any, slot: Any) -> None:
    _, K, V, D = group_UKVD.shape
    here_VD = lax.broadcasted_iota(jnp.int32, (V, D), 0) == slot
    for k in range(K):
        row_VD = jnp.broadcast_to(new_UKD[u, k : k + 1, :], (V, D))
        group_UKVD[run, k] = jnp.where(here_VD, row_VD, group_UKVD[run, k])


def _put_scales(group_UKZ: Any, new_UK2: Any, run: Any, u: Any, slot: Any) -> None:
    _, K, Z = group_UKZ.shape
    lane_KZ = lax.broadcasted_iota(jnp.int32, (K, Z), 1)
    new_K2 = new_UK2[u]
    new_KZ = jnp.where(lane_KZ < Z // 2, new_K2[:, :1], new_K2[:, 1:])
    here_KZ = (lane_KZ == slot) | (lane_KZ == slot + Z // 2)
    group_UKZ[run] = jnp.where(here_KZ, new_KZ, group_UKZ[run])


def _store(pool, new, group: _Group, *, page_T, slot_T, interpret):
    T = page_T.shape[0]
    shape = (pool.shape[1], *((group.size,) if pool.ndim == 4 else ()), pool.shape[-1])
    group_bytes = math.prod(shape) * pool.dtype.itemsize
    U = max(2, min(_MOST_TOKENS, _STEP_BYTES // group_bytes, T))
    pad = (0, -T % U)
    return pl.pallas_call(
        partial(_kernel, group, U),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(T, U),),
            in_specs=[
                pl.BlockSpec((U, *new.shape[1:]), lambda i, *_: (i, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((U, *shape), pool.dtype),
                pltpu.SemaphoreType.DMA((U,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * T * group_bytes
        ),
        interpret=interpret,
        name="kv_write",
    )(
        jnp.pad(page_T, pad, constant_values=-1),
        jnp.pad(slot_T, pad),
        jnp.pad(new, (pad, (0, 0), (0, 0))),
        pool,
    )


def _kernel(
    group: _Group, U: int, page_T, slot_T, new, _, pool, group_U, fetched_U, stored
) -> None:
    """U tokens: fetch the groups of all runs, change them as they arrive, store them."""
    first = pl.program_id(0) * U
    num_pages = pool.shape[0]

    def is_written(u: Any) -> Any:
        page = page_T[first + u]
        return (page >= 0) & (page < num_pages)

    def joined(u: Any) -> Any:
        """Whether tokens u and u + 1 are of one run."""
        a, b = first + u, first + u + 1
        same = slot_T[a] // group.size == slot_T[b] // group.size
        return (page_T[a] == page_T[b]) & same

    def begins(u: Any) -> Any:
        return is_written(u) & ((u == 0) | ~joined(jnp.maximum(u - 1, 0)))

    def ends(u: Any) -> Any:
        return is_written(u) & ((u == U - 1) | ~joined(jnp.minimum(u, U - 2)))

    def place(u: Any) -> Any:
        if group.size == group.page_size:
            return pool.at[page_T[first + u]]
        at = pl.multiple_of(slot_T[first + u] // group.size * group.size, group.size)
        return pool.at[page_T[first + u], :, pl.ds(at, group.size)]

    def fetch(u: Any, _: None) -> None:
        @pl.when(begins(u))
        def _():
            pltpu.make_async_copy(place(u), group_U.at[u], fetched_U.at[u]).start()

    def change(u: Any, run: Any) -> Any:
        run = jnp.where(begins(u), u, run)

        @pl.when(begins(u))
        def _():
            pltpu.make_async_copy(place(u), group_U.at[u], fetched_U.at[u]).wait()

        @pl.when(is_written(u))
        def _():
            group.put(group_U, new, run, u, slot_T[first + u] % group.size)

        @pl.when(ends(u))
        def _():
            pltpu.make_async_copy(group_U.at[run], place(u), stored).start()

        return run

    def settle(u: Any, _: None) -> None:
        @pl.when(ends(u))
        def _():
            pltpu.make_async_copy(group_U.at[u], place(u), stored).wait()

    lax.fori_loop(0, U, fetch, None)
    lax.fori_loop(0, U, change, jnp.int32(0))
    lax.fori_loop(0, U, settle, None)
