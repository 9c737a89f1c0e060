"""Write new keys and values into row pages on a GPU: a Pallas kernel, lowered through Triton.

Knows one layer's pages and a batch of tokens. One program per token and kv head: it loads the
head's new key and value once, quantises them in registers, and stores one row of the page and two
scales. Buffers are aliased, so that nothing else of the pool is touched or copied.

Dimension key: T tokens  K kv heads  C channels per head  N pages in the pool  S slots per page
D = 2C  Z = 2S  A = C rounded up to a power of two: Triton knows no other sizes
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from . import quant
from .kv_pages import RowPages


def write(pages: RowPages, k_TKC, v_TKC, page_T, slot_T, *, interpret: bool = False) -> RowPages:
    """What `kv_write.write_kv` means, for `RowPages`."""
    T, K, C = k_TKC.shape
    stored = pages.kv_NKSD, *(() if pages.scale_NKZ is None else (pages.scale_NKZ,))
    operands = page_T.astype(jnp.int32), slot_T.astype(jnp.int32), k_TKC, v_TKC
    written = pl.pallas_call(
        partial(_write_row, head_dim=C),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored),
        grid=(T, K),
        input_output_aliases={len(operands) + i: i for i in range(len(stored))},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * T * K * C * (k_TKC.dtype.itemsize + stored[0].dtype.itemsize),
        ),
        interpret=interpret,
        name="kv_write",
    )(*operands, *stored)
    return RowPages(written[0], written[1] if len(written) > 1 else None)


def _write_row(page_ref, slot_ref, k_ref, v_ref, *refs: Any, head_dim: int) -> None:
    kv_ref, *scale_refs = refs[len(refs) // 2 :]  # the outputs: aliases of the first half
    num_pages, _, page_size, _ = kv_ref.shape
    t, k = pl.program_id(0), pl.program_id(1)
    page, slot = page_ref[t], slot_ref[t]
    channel_A = jnp.arange(pl.next_power_of_2(head_dim))
    real_A = channel_A < head_dim

    @pl.when((page >= 0) & (page < num_pages))
    def _store() -> None:
        for half, new_ref in enumerate((k_ref, v_ref)):
            row_A = plgpu.load(new_ref.at[t, k, channel_A], mask=real_A, other=0)
            if scale_refs:
                row_A, scale = quant.quantise(row_A, kv_ref.dtype)
                scale_refs[0][page, k, half * page_size + slot] = scale
            target = kv_ref.at[page, k, slot, half * head_dim + channel_A]
            plgpu.store(target, row_A.astype(kv_ref.dtype), mask=real_A)
