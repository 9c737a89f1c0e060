"""Paged attention of torch's libraries, on the decode steps that our kernel is timed on.

`python -m jaxserve.bench.peers.attention_kernels --sizes=full` prints one result per library and
shape, in the protocol. Knows the libraries' interfaces. Runs in the peers' Python and imports no
JAX. A library's time counts only after its output was compared with attention in float64; one that
fails has a result that says why. Without a GPU flex attention runs unfused, and the others do not.

Dimension key: B rows  H query heads  K kv heads  G = H / K  C channels per head  N pages
S slots per page  P pages per row  T keys
"""
# pyright: reportMissingImports=false

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from jaxserve.bench.peers.decode_shapes import FULL, LARGEST_ERROR, TINY, Sizes, page_tables
from jaxserve.bench.peers.protocol import KernelResult, emit, first_line

_CALLS: Final = 16  # in one CUDA graph
_TURNS: Final = 5  # of which the fastest counts

Call = Callable[[], torch.Tensor]
"""One decode step: out_BHC."""


class Step(NamedTuple):
    """One decode step's operands; tables and lengths are on the host."""

    q_BHC: torch.Tensor
    k_NSKC: torch.Tensor
    v_NSKC: torch.Tensor
    table_BP: np.ndarray
    len_B: np.ndarray


def make_step(sizes: Sizes, lengths: Sequence[int], device: str) -> Step:
    """Random rows of these lengths in bfloat16, their pages scattered over the pool."""
    table_BP, num_pages = page_tables(lengths, sizes.page_size)
    random = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)

    pool = (num_pages, sizes.page_size, sizes.kv_heads, sizes.head_dim)
    q_BHC = normal(len(lengths), sizes.heads, sizes.head_dim)
    return Step(q_BHC, normal(*pool), normal(*pool), table_BP, np.array(lengths))


def exact(step: Step) -> torch.Tensor:
    """out_BHC in float64, row by row."""
    S, K, C = step.k_NSKC.shape[1:]
    rows = []
    for q_HC, pages, length in zip(step.q_BHC, step.table_BP, step.len_B, strict=True):
        own = torch.tensor(pages[: -(-length // S)], device=q_HC.device)
        k_TKC, v_TKC = (
            pool[own].reshape(-1, K, C)[:length].double() for pool in (step.k_NSKC, step.v_NSKC)
        )
        q_KGC = q_HC.double().reshape(K, -1, C) * C**-0.5
        p_KGT = torch.softmax(q_KGC @ k_TKC.permute(1, 2, 0), dim=-1)
        rows.append((p_KGT @ v_TKC.transpose(0, 1)).reshape(-1, C))
    return torch.stack(rows)


def worst_error(got_BHC: torch.Tensor, want_BHC: torch.Tensor) -> float:
    """The largest error of a row over its largest number; NaN if anything is not a number."""
    error_B = (got_BHC.double() - want_BHC).abs().amax((1, 2))
    return float((error_B / want_BHC.abs().amax((1, 2))).max())


def flashinfer_decode(step: Step) -> Call:
    """FlashInfer 0.3's batch decode; it compiles itself by nvcc when it is first planned."""
    import flashinfer

    q, device = step.q_BHC, step.q_BHC.device
    S, K, C = step.k_NSKC.shape[1:]
    num_pages_B = -(-step.len_B // S)
    own = zip(step.table_BP, num_pages_B, strict=True)
    indices = np.concatenate([row[:n] for row, n in own])
    indptr, last = np.concatenate([[0], np.cumsum(num_pages_B)]), (step.len_B - 1) % S + 1
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(2**27, dtype=torch.uint8, device=device),
        "NHD",
        use_tensor_cores=q.shape[1] // K >= 4,  # as the servers that use it choose
    )
    parts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (indptr, indices, last))
    wrapper.plan(*parts, q.shape[1], K, C, S, q_data_type=q.dtype, kv_data_type=q.dtype)
    return lambda: wrapper.run(q, (step.k_NSKC, step.v_NSKC))


def flex(step: Step) -> Call:
    """Flex attention over the pool as one long row, of which each row sees its own pages."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, (B, _, C) = step.q_BHC.device, step.q_BHC.shape
    N, S, K, _ = step.k_NSKC.shape
    # For a page of the pool: the position of its first key in row b, or -1.
    first_BN = np.full((B, N), -1, np.int32)
    for b, n in enumerate(-(-step.len_B // S)):
        first_BN[b, step.table_BP[b, :n]] = S * np.arange(n)
    first = torch.tensor(first_BN, device=device)
    lengths = torch.tensor(step.len_B, device=device)

    def visible(b, h, q_index, kv_index):
        at = first[b, kv_index // S]
        return (at >= 0) & (at + kv_index % S < lengths[b])

    pools = (step.k_NSKC, step.v_NSKC)
    keys, values = (x.permute(2, 0, 1, 3).reshape(1, K, N * S, C).contiguous() for x in pools)
    queries = step.q_BHC[:, :, None]
    attend = flex_attention
    if device.type == "cuda":  # fused, each shape for itself
        attend = torch.compile(flex_attention, dynamic=False)

    def with_blocks(size: int) -> Call:
        mask = create_block_mask(
            visible, B, None, 1, N * S, device=device.type, BLOCK_SIZE=(128, size)
        )
        return lambda: attend(queries, keys, values, block_mask=mask, enable_gqa=True)[:, :, 0]

    try:
        call = with_blocks(S)  # no block of the mask holds pages of two rows
        call()
    except Exception:  # not every release takes blocks so small; its default reads more
        call = with_blocks(128)
    return call


class Library(NamedTuple):
    """An adapter, and what it needs."""

    adapter: Callable[[Step], Call]
    module: str
    needs_gpu: bool


LIBRARIES: Final = {
    "torch flex": Library(flex, "torch", needs_gpu=False),
    "flashinfer": Library(flashinfer_decode, "flashinfer", needs_gpu=True),
}
"""By name; the one that compiles longest comes last."""


def results(
    sizes: Sizes, device: str, libraries: Sequence[str] = tuple(LIBRARIES)
) -> Iterator[KernelResult]:
    """Every library on every shape."""
    for name in libraries:
        library = LIBRARIES[name]
        note = ""
        if importlib.util.find_spec(library.module) is None:
            note = "not installed"
        elif library.needs_gpu and device != "cuda":
            note = "needs a GPU"
        for shape, lengths in sizes.decode:
            if note:
                yield KernelResult(peer=name, shape=shape, note=note)
            else:
                yield measured(name, shape, make_step(sizes, lengths, device), sizes.budget_s)


def measured(name: str, shape: str, step: Step, budget_s: float) -> KernelResult:
    """One library on one step: its seconds, or why there are none."""
    try:
        call = LIBRARIES[name].adapter(step)
        run, out_BHC, calls = _prepared(call, step.q_BHC.device.type)
        error = worst_error(out_BHC, exact(step))
        if not error <= LARGEST_ERROR:
            note = f"wrong: off by {error:.1e}, so its time does not count"
            return KernelResult(peer=name, shape=shape, error=error, note=note)
        seconds = _seconds(run, budget_s, step.q_BHC.device.type) / calls
    except Exception as error:  # the report says what a library could not do, and goes on
        return KernelResult(peer=name, shape=shape, note=first_line(error))
    note = "" if calls > 1 else "launched from Python"
    return KernelResult(peer=name, shape=shape, seconds=seconds, error=error, note=note)


def _prepared(call: Call, device: str) -> tuple[Callable[[], Any], torch.Tensor, int]:
    """What to time, the output that it leaves behind, and how many steps it is.

    On a GPU that is one graph of many steps: Python takes longer to launch a short kernel than
    the kernel runs. What cannot be captured is launched one by one.
    """
    out_BHC = call()
    if device != "cuda":
        return call, out_BHC, 1
    call()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                captured_BHC = call()
    except Exception as error:  # the library's own limits; the eager time is a time as well
        warnings.warn(f"no CUDA graph: {first_line(error)}", stacklevel=2)
        return call, out_BHC, 1
    captured_BHC.zero_()  # so that a graph that captured nothing is found out
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, captured_BHC, _CALLS


def _seconds(run: Callable[[], Any], budget_s: float, device: str) -> float:
    """The least seconds of one `run`."""

    def turn(runs: int) -> float:
        if device != "cuda":
            began_s = time.perf_counter()
            for _ in range(runs):
                run()
            return (time.perf_counter() - began_s) / runs
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / runs

    turn(1)
    runs = max(1, int(budget_s / _TURNS / turn(1)))
    return min(turn(runs) for _ in range(_TURNS))


def main() -> None:
    """Prints every library's results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=("full", "tiny"), required=True)
    options = parser.parse_args()
    torch._dynamo.config.cache_size_limit = 64
    device = "cuda" if torch.cuda.is_available() and options.sizes == "full" else "cpu"
    if options.sizes == "full" and device == "cpu":
        for name in LIBRARIES:
            emit(KernelResult(peer=name, shape="", note="this Python's torch finds no GPU"))
        return
    for result in results(FULL if options.sizes == "full" else TINY, device):
        emit(result)


if __name__ == "__main__":
    main()
