"""Paged attention on the GPU against float64: random ragged batches over all its options.

Knows the kernel and what it must answer; `tests/kernels` runs it interpreted, `scripts/gpu_check`
compiled. Slots that no row may read hold NaN, or extreme bytes where numbers have no NaN.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  G = H / K
C channels per head  D = 2C  N pages  S slots per page  P pages per row  T keys  Z = 2S
"""

import argparse
import itertools
import json
import queue
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.bench.peers.protocol import first_line
from jaxserve.kernels import paged_attention_gpu
from jaxserve.kernels.block_sizes import GpuBlocks
from jaxserve.kernels.kv_pages import RowPages

_KV_HEADS: Final = 2

INTERPRETED: Final[dict[str, Any]] = {"xla_backend_optimization_level": 0}
"""Compiler options for what takes longer to compile than to run, such as interpreted kernels."""

if jax.__version_info__ < (0, 11):  # half the time; later releases do not know the option
    INTERPRETED["xla_cpu_use_fusion_emitters"] = False

TRITON_CALL: Final = "custom_call @__gpu$xla.gpu.triton"
"""How a Pallas kernel for a GPU begins in what `lower_for_cuda` returns."""


class Options(NamedTuple):
    """One choice of everything that makes a kernel of its own."""

    queries: int
    head_dim: int
    page_size: int
    stored: str
    group: int
    window: int | None
    soft_cap: float | None


VALUES: Final[dict[str, tuple[Any, ...]]] = dict(
    queries=(1, 16),
    head_dim=(64, 80, 96, 128, 256),
    page_size=(16, 32, 64, 128),
    stored=("float32", "bfloat16", "int8", "float8_e4m3fn"),
    group=(1, 4, 7),
    window=(None, 50),
    soft_cap=(None, 5.0),
)
"""What each option may be; `MATRIX` is all that can be chosen from them."""

MATRIX = tuple(Options(*choice) for choice in itertools.product(*VALUES.values()))


class Batch:
    """Random queries, pages and shuffled tables for rows of these lengths."""

    def __init__(self, seed, lengths, *, Q=1, C=32, S=16, stored="float32", G=3, P=6, window=None):
        rng = np.random.default_rng(seed)
        B, K = len(lengths), _KV_HEADS
        N = B * P + 3
        self.S, self.window = S, window
        self.len_B = np.array(lengths, np.int32)
        self.start_B = np.maximum(self.len_B - Q, 0).astype(np.int32)
        self.table_BP = rng.permutation(N)[: B * P].reshape(B, P).astype(np.int32)
        wide = np.float32 if stored == "float32" else jnp.bfloat16
        self.q_BQHC = rng.standard_normal((B, Q, K * G, C)).astype(wide)
        kv_NKSD = rng.standard_normal((N, K, S, 2 * C))
        self.scale_NKZ = None
        if jnp.dtype(stored).itemsize == 1:
            kv_NKSD = np.round(kv_NKSD * 30)
            self.scale_NKZ = rng.uniform(0.01, 0.05, (N, K, 2 * S)).astype(np.float32)
        self.kv_NKSD = kv_NKSD.astype(stored)
        unread_NS = ~self._read_NS()
        self.kv_NKSD.transpose(0, 2, 1, 3)[unread_NS] = -128 if stored == "int8" else np.nan
        if self.scale_NKZ is not None:
            self.scale_NKZ.reshape(N, K, 2, S).transpose(0, 3, 1, 2)[unread_NS] = np.nan

    def _read_NS(self):
        """Which slots some row may read."""
        read_NS = np.zeros((len(self.kv_NKSD), self.S), bool)
        for row, length, start in zip(self.table_BP, self.len_B, self.start_B, strict=True):
            last = min(start, length - 1)
            first = 0 if self.window is None else max(0, last + 1 - self.window)
            t = np.arange(first, length)
            read_NS[row[t // self.S], t % self.S] = True
        return read_NS

    def operands(self, rows=slice(None), *, table_BP=None):
        """What `attend` takes, for some of the rows."""
        table_BP = self.table_BP if table_BP is None else table_BP
        scale_NKZ = None if self.scale_NKZ is None else jnp.asarray(self.scale_NKZ)
        pages = RowPages(jnp.asarray(self.kv_NKSD), scale_NKZ)
        rest = (self.q_BQHC, table_BP, self.len_B, self.start_B)
        q_BQHC, *rest = (jnp.asarray(x[rows]) for x in rest)
        return q_BQHC, pages, *rest

    def reference(self, *, soft_cap=None, scale=None):
        """Attention in float64, row by row and head by head; NaN for padding queries."""
        B, Q, H, C = self.q_BQHC.shape
        out_BQHC = np.full(self.q_BQHC.shape, np.nan)
        for b in range(B):
            length = self.len_B[b]
            last_Q = self.start_B[b] + np.arange(Q)
            if length == 0:
                out_BQHC[b] = 0
                continue
            last_Q = last_Q[last_Q < length]
            first = 0 if self.window is None else max(0, last_Q[0] + 1 - self.window)
            t = np.arange(first, length)
            page_T, slot_T = self.table_BP[b, t // self.S], t % self.S
            visible_QT = t <= last_Q[:, None]
            if self.window is not None:
                visible_QT &= t > last_Q[:, None] - self.window
            for h in range(H):
                k = h * _KV_HEADS // H
                k_TC, v_TC = np.split(self.kv_NKSD[page_T, k, slot_T].astype(np.float64), 2, axis=1)
                if self.scale_NKZ is not None:
                    k_TC = k_TC * self.scale_NKZ[page_T, k, slot_T][:, None]
                    v_TC = v_TC * self.scale_NKZ[page_T, k, slot_T + self.S][:, None]
                q_QC = self.q_BQHC[b, : len(last_Q), h].astype(np.float64)
                s_QT = q_QC @ k_TC.T * (C**-0.5 if scale is None else scale)
                if soft_cap is not None:
                    s_QT = soft_cap * np.tanh(s_QT / soft_cap)
                s_QT = np.where(visible_QT, s_QT, -np.inf)
                e_QT = np.exp(s_QT - s_QT.max(axis=1, keepdims=True))
                p_QT = e_QT / e_QT.sum(axis=1, keepdims=True)
                out_BQHC[b, : len(last_Q), h] = p_QT @ v_TC
        return out_BQHC


def worst_error(got_BQHC, want_BQHC) -> float:
    """The largest error of a row over its largest number; infinite if anything is not finite."""
    got_BQHC = np.asarray(got_BQHC, np.float64)
    if not np.isfinite(got_BQHC).all():
        return float("inf")
    valid_BQHC = np.isfinite(want_BQHC)  # padding queries: what is returned means nothing
    error_B = np.abs(np.where(valid_BQHC, got_BQHC - want_BQHC, 0)).max((1, 2, 3))
    size_B = np.abs(np.where(valid_BQHC, want_BQHC, 0)).max((1, 2, 3))
    return float((error_B / np.where(size_B > 0, size_B, 1)).max())


def limit(stored: str) -> float:
    """What `worst_error` may be: float32 keeps its digits, all else is multiplied in bfloat16."""
    return 1e-5 if stored == "float32" else 1e-2


def check(options: Options, *, interpret: bool, blocks: GpuBlocks | None, longest: int) -> float:
    """The worst error over rows of 0, 1, whole pages, part of a page and `longest` keys."""
    Q, C, S, stored, G, window, soft_cap = options
    P = max(2, longest // S)
    lengths = [0, 1, S, min(2 * S + 5, P * S), P * S]
    batch = Batch(C + S, lengths, Q=Q, C=C, S=S, stored=stored, G=G, P=P, window=window)
    attend = partial(
        paged_attention_gpu.attend,
        **dict(window=window, soft_cap=soft_cap, scale=None, interpret=interpret, blocks=blocks),
    )
    compiled = jax.jit(attend, compiler_options=INTERPRETED if interpret else None)
    return worst_error(compiled(*batch.operands()), batch.reference(soft_cap=soft_cap))


def lower_for_cuda(function: Any, *operands: Any) -> str:
    """The module of a jitted function, lowered for CUDA on any machine.

    Releases after 0.10 want to be told of a GPU, and warn that the lowering is deprecated.
    """
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL.split("@")[1])]
    gpu = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")  # pyright: ignore
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        export = jax.export.export(function, platforms=["cuda"], disabled_checks=unchecked)
        return export(*operands).mlir_module()


def check_many(
    *,
    seconds: float,
    interpret: bool,
    threads: int = 1,
    matrix: Sequence[Options] = MATRIX,
) -> Iterator[tuple[Options, float | str]]:
    """Check `matrix` in random order for about so many seconds; error, or why there is none."""
    order = random.Random(0).sample(matrix, len(matrix))
    until_s = time.monotonic() + seconds

    def one(options: Options) -> float | str | None:
        if time.monotonic() > until_s:
            return None
        try:
            longest = 160 if interpret else 1024
            return check(options, interpret=interpret, blocks=None, longest=longest)
        except Exception as error:  # the report says which options failed, and goes on
            return first_line(error)

    with ThreadPoolExecutor(threads) as pool:
        waiting = {pool.submit(one, options): options for options in order}
        for done in as_completed(waiting):
            error = done.result()
            if error is not None:
                yield waiting[done], error


def check_in_processes(
    *, seconds: float, interpret: bool, processes: int
) -> Iterator[tuple[Options, float | str]]:
    """`check_many` of the whole matrix, spread over processes: tracing keeps one core busy.

    A process that dies has its last words as the error of a check that it did not come to.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def follow(share: int) -> None:
        command = [sys.executable, "-m", __name__, f"--share={share}", f"--of={processes}"]
        command += [f"--seconds={seconds}", *(["--interpret"] if interpret else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
        if process.returncode:
            died = f"the process that checks one in {processes} ended with {process.returncode}"
            lines.put(json.dumps([MATRIX[share], died]))
        lines.put(None)

    for share in range(processes):
        threading.Thread(target=follow, args=(share,), daemon=True).start()
    while processes:
        line = lines.get()
        if line is None:
            processes -= 1
            continue
        options, error = json.loads(line)
        yield Options(*options), error


def main() -> None:
    """Checks a share of the matrix; prints a JSON line of options and error for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    share = MATRIX[options.share :: options.of]
    # The second thread traces while the first compiles.
    checks = check_many(
        seconds=options.seconds, interpret=options.interpret, threads=2, matrix=share
    )
    for each, error in checks:
        print(json.dumps([each, error]), flush=True)


if __name__ == "__main__":
    main()
