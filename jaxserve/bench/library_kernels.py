"""Paged attention of other libraries on the pages of one decode step, where they are installed.

Knows their interfaces; each takes the operands of `jaxserve.bench.kernels.Decode` and a budget, and
returns the seconds of one call, measured by CUDA's events.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any, Final

import numpy as np


def _torch_pages(decode: Any):
    """Queries [B, H, C], keys and values [N, S, K, C] as torch tensors, and lengths on the host."""
    import torch

    def tensor(x):
        return torch.from_dlpack(x)

    kv_NSKD = decode.pages.kv_NKSD.transpose(0, 2, 1, 3)
    C = kv_NSKD.shape[3] // 2
    q, k, v = tensor(decode.q_BQHC[:, 0]), tensor(kv_NSKD[..., :C]), tensor(kv_NSKD[..., C:])
    return q, k.contiguous(), v.contiguous(), np.asarray(decode.len_B)


def _seconds(call: Callable[[], Any], budget_s: float) -> float:
    import torch

    def run(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    run(3)
    calls = max(3, int(budget_s / 5 / run(3)))
    return min(run(calls) for _ in range(5))


def _flashinfer(decode: Any, budget_s: float) -> float:
    import flashinfer
    import torch

    q, k, v, len_B = _torch_pages(decode)
    S, table_BP = k.shape[1], np.asarray(decode.table_BP)
    num_pages_B = -(-len_B // S)
    indices = np.concatenate([row[:n] for row, n in zip(table_BP, num_pages_B, strict=True)])
    workspace = torch.empty(2**27, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    indptr, last = np.concatenate([[0], np.cumsum(num_pages_B)]), (len_B - 1) % S + 1
    parts = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (indptr, indices, last))
    sizes = (q.shape[1], k.shape[2], k.shape[3], S)
    wrapper.plan(*parts, *sizes, q_data_type=q.dtype, kv_data_type=k.dtype)
    return _seconds(lambda: wrapper.run(q, (k, v)), budget_s)


def _flex(decode: Any, budget_s: float) -> float:
    """Flex attention over the pool as one long row, of which each row sees its own pages."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, len_B = _torch_pages(decode)
    (B, _, _), (N, S, K, C) = q.shape, k.shape
    table_BP = np.asarray(decode.table_BP)
    # For a token of the pool: its position in row b's keys, or -1.
    first_BN = np.full((B, N), -1, np.int32)
    for b, n in enumerate(-(-len_B // S)):
        first_BN[b, table_BP[b, :n]] = S * np.arange(n)
    first = torch.tensor(first_BN, device="cuda")
    lengths = torch.tensor(len_B, device="cuda")

    def visible(b, h, q_index, kv_index):
        at = first[b, kv_index // S]
        return (at >= 0) & (at + kv_index % S < lengths[b])

    mask = create_block_mask(visible, B, None, 1, N * S, device="cuda", _compile=True)
    one = (t.reshape(1, N * S, K, C).transpose(1, 2).expand(B, -1, -1, -1) for t in (k, v))
    keys, values = one
    queries = q[:, :, None]
    flex = torch.compile(flex_attention)
    return _seconds(lambda: flex(queries, keys, values, block_mask=mask, enable_gqa=True), budget_s)


LIBRARIES: Final[dict[str, Callable[[Any, float], float]]] = {
    "flashinfer": _flashinfer,
    "torch": _flex,
}
"""By the name of the package that is imported."""
