"""The TPU kernel against float64: interpreted, with NaN in fresh memory and races detected.

Then compiled by the real TPU compiler, where libtpu is installed; no TPU is needed for that.
"""

import itertools
from collections.abc import Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxserve.bench.kernel_check import INTERPRETED
from jaxserve.kernels import paged_attention_tpu
from jaxserve.kernels.block_sizes import tpu_blocks
from jaxserve.kernels.kv_pages import RowPages
from jaxserve.kernels.paged_attention_tpu import (
    Sizes,
    attend,
    row_lanes,
    sizes_of,
    unsupported,
)

P = 5
FLOAT32 = dict(dtype="float32", C=16, S=16, G=2, Q=1, window=None, soft_cap=None, cores=1, ring=3)
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 1e-5, "float8_e4m3fn": 1e-5}
FEW_OPTIONS = dict(
    dtype=["float32", "bfloat16", "int8", "float8_e4m3fn"],
    C=[80, 128],
    S=[64, 16],
    G=[3, 1],
    Q=[1, 16],
    window=[None, 37],
    soft_cap=[None, 2.0],
    cores=[1, 2],
    ring=[2, 4],
)
ALL_OPTIONS = FEW_OPTIONS | dict(
    C=[16, 64, 80, 96, 128, 256], S=[16, 32, 64, 128], Q=[1, 5, 16, 32], window=[None, 1, 37, 200]
)


def pairwise(options: dict[str, Sequence[Any]], allowed=lambda case: True) -> list[dict[str, Any]]:
    """Cases in which each two values of different options meet at least once, greedily few."""
    names = list(options)
    cases = [dict(zip(names, c, strict=True)) for c in itertools.product(*options.values())]
    cases = [c for c in cases if allowed(c)]

    def pairs(case) -> set:
        return set(itertools.combinations(case.items(), 2))

    missing = set().union(*(pairs(c) for c in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda c: len(pairs(c) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def name_of(case: dict[str, Any]) -> str:
    return "-".join(f"{name}{value}" for name, value in case.items())


def is_supported(case: dict[str, Any]) -> bool:
    kind = case.get("kind")
    return not unsupported(
        head_dim=case["C"], page_size=case["S"], dtype=case["dtype"], group=2, device_kind=kind
    )


class Batch:
    """Rows of given lengths on shuffled pages; what no query may see is NaN or nonsense."""

    def __init__(self, lengths: Sequence[int], case: dict[str, Any], *, K: int = 2, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.case = case
        C, S, Q, dtype = (case[name] for name in ("C", "S", "Q", "dtype"))
        B = len(lengths)
        N = B * P + 2
        self.len_B = np.array(lengths, np.int32)
        self.start_B = np.maximum(self.len_B - Q, 0)
        self.table_BP = rng.permutation(N)[: B * P].reshape(B, P).astype(np.int32)
        kv_NKSD = rng.standard_normal((N, K, S, row_lanes(C))).astype(np.float32)
        scale_NKZ = None
        if narrow := dtype in ("int8", "float8_e4m3fn"):
            kv_NKSD = np.round(np.clip(kv_NKSD * 40, -127, 127))
            scale_NKZ = rng.uniform(0.01, 0.04, (N, K, 2 * S)).astype(np.float32)
        used_NS = np.zeros((N, S), bool)
        for row, length in zip(self.table_BP, lengths, strict=True):
            for t in range(length):
                used_NS[row[t // S], t % S] = True
            row[-(-length // S) :] = rng.choice([-5, N, 2**31 - 1, 0], P - -(-length // S))
        if dtype != "int8":
            kv_NKSD.transpose(0, 2, 1, 3)[~used_NS] = np.nan
        if narrow:
            scale_NKZ.reshape(N, K, 2, S).transpose(0, 3, 1, 2)[~used_NS] = np.nan
        self.pages = jax.tree.map(
            jnp.asarray, RowPages(jnp.asarray(kv_NKSD).astype(dtype), scale_NKZ)
        )
        q_BQHC = jnp.asarray(rng.standard_normal((B, Q, K * case["G"], C)), jnp.float32)
        self.q_BQHC = q_BQHC.astype("bfloat16" if dtype == "bfloat16" else "float32")

    def operands(self, rows=slice(None)):
        own = (self.table_BP[rows], self.len_B[rows], self.start_B[rows])
        return (self.q_BQHC[rows], self.pages, *map(jnp.asarray, own))

    def run(self, rows=slice(None)) -> np.ndarray:
        case = self.case
        call = jitted(
            paged_attention_tpu._TABLE_BYTES,
            *(case[name] for name in ("S", "window", "soft_cap", "cores", "ring")),
        )
        out = np.asarray(call(*self.operands(rows)).astype(jnp.float32))
        assert not interpret_pallas_call.races.races_found
        return out

    def in_float64(self) -> np.ndarray:
        """One query and head after another, over the row's tokens and nothing else."""
        C, S, G = (self.case[name] for name in ("C", "S", "G"))
        window, soft_cap = self.case["window"], self.case["soft_cap"]
        q_BQHC = np.asarray(self.q_BQHC, np.float64)
        kv_NSKD = np.asarray(self.pages.kv_NKSD, np.float64).transpose(0, 2, 1, 3)
        k_NSKC, v_NSKC = kv_NSKD[..., :C], kv_NSKD[..., C : 2 * C]
        if self.pages.scale_NKZ is not None:
            scale_NKZ = np.asarray(self.pages.scale_NKZ, np.float64)
            k_NSKC = k_NSKC * scale_NKZ[..., :S].transpose(0, 2, 1)[..., None]
            v_NSKC = v_NSKC * scale_NKZ[..., S:].transpose(0, 2, 1)[..., None]
        out_BQHC = np.zeros(q_BQHC.shape)
        for b, i, h in np.ndindex(q_BQHC.shape[:3]):
            last = min(self.start_B[b] + i, self.len_B[b] - 1)
            seen = np.arange(0 if window is None else max(0, last + 1 - window), last + 1)
            if not len(seen):
                continue
            at = self.table_BP[b][seen // S], seen % S, h // G
            s = k_NSKC[at] @ q_BQHC[b, i, h] * C**-0.5
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            weight = np.exp(s - s.max())
            out_BQHC[b, i, h] = weight / weight.sum() @ v_NSKC[at]
        return out_BQHC

    def differs(self, want: np.ndarray) -> list[int]:
        """The rows whose result is further from `want` than their type may be; NaN is far."""
        error_B, peak_B = (np.abs(x).max((1, 2, 3)) for x in (self.run() - want, want))
        return np.flatnonzero(~(error_B <= TOLERANCES[self.case["dtype"]] * peak_B)).tolist()


@cache
def jitted(table_bytes: int, S: int, window, soft_cap, cores: int, ring: int):
    """Blocks of two pages; two cores take turns in an order that the interpreter draws.

    The size of a call's tables is read when it is traced.
    """
    return jax.jit(
        partial(
            attend,
            window=window,
            soft_cap=soft_cap,
            scale=None,
            interpret=pltpu.InterpretParams(detect_races=True, random_seed=1),
            sizes=Sizes(block=2 * S, ring=ring, cores=cores),
        ),
        compiler_options=INTERPRETED,
    )


def assert_right_and_not_with_a_wrong_page(case: dict[str, Any]) -> None:
    S = case["S"]
    batch = Batch([P * S, 0, 1, 2 * S, 3 * S + 7], case)
    want = batch.in_float64()
    assert not batch.differs(want)
    batch.table_BP[[0, 3], [4, 1]] = batch.table_BP[[3, 0], [1, 4]]
    assert batch.differs(want) == [0, 3]


FEW = pairwise(FEW_OPTIONS, is_supported)


@pytest.mark.parametrize("case", FEW, ids=map(name_of, FEW))
def test_every_two_options_together_agree_with_float64(case):
    assert_right_and_not_with_a_wrong_page(case)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_options_drawn_from_all_agree_with_float64():
    rng = np.random.default_rng(0)
    for _ in range(300):
        drawn = {name: values[rng.integers(len(values))] for name, values in ALL_OPTIONS.items()}
        if is_supported(drawn):
            assert_right_and_not_with_a_wrong_page(drawn)


@settings(max_examples=4)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(0, P * 16), min_size=5, max_size=5))
@pytest.mark.parametrize("more", [dict(Q=1), dict(Q=16, window=37, cores=2)], ids=name_of)
def test_ragged_batches_agree_with_float64(more, seed, lengths):
    batch = Batch(lengths, FLOAT32 | more, seed=seed)
    assert not batch.differs(batch.in_float64())


@pytest.mark.parametrize("Q", [1, 16])
def test_a_row_has_the_same_bits_in_any_batch(Q):
    batch = Batch([7, 80, 16, 0, 33], FLOAT32 | dict(Q=Q))
    together = batch.run()
    np.testing.assert_array_equal(batch.run(np.array([4, 2, 0, 3, 1])), together[[4, 2, 0, 3, 1]])
    np.testing.assert_array_equal(batch.run(np.array([3, 4, 3, 3, 3]))[1], together[4])  # alone


def test_padding_queries_and_empty_batches_stay_finite():
    batch = Batch([10, 0, 3, 40, 1], FLOAT32 | dict(Q=16))
    batch.start_B = np.array([8, 0, 7, 24, 0], np.int32)
    want = batch.in_float64()
    got = batch.run()
    assert np.isfinite(got).all() and not got[1].any()
    for b, valid in enumerate([2, 0, 0, 16, 1]):
        np.testing.assert_allclose(got[b, :valid], want[b, :valid], rtol=1e-4, atol=1e-5)
    batch.len_B[:] = 0
    assert not batch.run().any()


def test_a_length_beyond_the_table_reads_what_the_table_holds():
    batch = Batch([80, 80, 80, 80, 80], FLOAT32)
    want = batch.run()
    batch.len_B[2] = batch.start_B[2] = 2**20
    np.testing.assert_array_equal(batch.run(), want)


def test_tables_beyond_scalar_memory_are_cut(monkeypatch):
    """Of a smaller memory, of which three rows take all; compiled, below, of the real one."""
    batch = Batch([80, 5, 33, 0, 16], FLOAT32)
    want = batch.run()
    monkeypatch.setattr(paged_attention_tpu, "_TABLE_BYTES", 3 * 4 * P)
    np.testing.assert_array_equal(batch.run(), want)


def test_rows_without_whole_lanes_are_refused():
    q_BQHC, pages, *rest = Batch([4], FLOAT32 | dict(C=80)).operands()
    narrower = RowPages(pages.kv_NKSD[..., :160], None)
    with pytest.raises(ValueError, match="hold rows of 256 for 80 channels, got 160"):
        attend(q_BQHC, narrower, *rest, window=None, soft_cap=None, scale=None)


@pytest.mark.parametrize(
    "more, answer",
    [
        (dict(), None),
        (dict(head_dim=100), "head_dim: got 100; allowed: multiples of 16 up to 256"),
        (dict(head_dim=512), "head_dim: got 512; allowed"),
        (
            dict(page_size=8),
            "page_size: got 8; allowed for bfloat16 pages on a TPU: 16, 32, 64, 128",
        ),
        (dict(dtype="int8", page_size=64), None),
        (dict(dtype="int8"), "page_size: got 16; allowed for int8 pages on a TPU: 64, 128"),
        (dict(dtype="float16"), "dtype: got float16; allowed: float32, bfloat16, int8, float8"),
        (dict(dtype="float8_e4m3fn", page_size=64, device_kind="TPU v6 lite"), None),
        (dict(dtype="float8_e4m3fn", page_size=64, device_kind="TPU v5 lite"), "no such type"),
    ],
)
def test_what_has_no_kernel_is_named(more, answer):
    why = unsupported(**(dict(head_dim=128, page_size=16, dtype="bfloat16", group=4) | more))
    assert why is None if answer is None else why and answer in why


@pytest.mark.parametrize(
    "kind, dtype, B, sizes",
    [
        ("TPU v5 lite", "bfloat16", 8, Sizes(256, 4, 1)),
        ("TPU v5", "bfloat16", 8, Sizes(512, 4, 2)),
        ("TPU v5", "bfloat16", 1, Sizes(512, 4, 1)),
        ("TPU v6 lite", "float32", 8, Sizes(256, 4, 1)),
        ("TPU of another day", "float32", 8, Sizes(128, 4, 1)),
    ],
)
def test_sizes_follow_the_kind_of_device(kind, dtype, B, sizes):
    pages = RowPages(jnp.zeros((1, 8, 16, 256), dtype), None)
    blocks = tpu_blocks(kind, head_dim=128, page_size=16, dtype=dtype)
    assert sizes_of(blocks, pages, B) == sizes


# -- Compiled for TPUs that are not there ---------------------------------------------------------

KINDS = {"v5e:2x2": "TPU v5 lite", "v6e:2x2": "TPU v6 lite", "v5p:2x2x1": "TPU v5"}
FEW_COMPILED = dict(
    topology=list(KINDS),
    dtype=["bfloat16", "int8", "float32", "float8_e4m3fn"],
    C=[128, 64, 80],
    S=[64, 16],
    G=[4, 1],
    Q=[1, 16],
    window=[None, 4096],
    soft_cap=[None, 30.0],
    tp=[1, 2],
)
ALL_COMPILED = FEW_COMPILED | dict(
    C=[16, 48, 64, 80, 96, 128, 160, 256], S=[16, 32, 64, 128], G=[1, 4, 8], Q=[1, 16, 128]
)
ROWS = dict(B=16, P=64, K=2)


def compiles_there(case: dict[str, Any]) -> bool:
    return is_supported(case | dict(kind=KINDS[case["topology"]]))


def assert_compiled(answers) -> None:
    for case, answer in answers:
        B, K = case["B"], case["K"]
        tokens = B * case["P"] * case["S"]
        query_bytes = B * case["Q"] * K * case["G"] * row_lanes(case["C"]) * 4
        narrow = case["dtype"] in ("int8", "float8_e4m3fn")
        assert answer["calls"] >= (3 if narrow else 2), (case, answer)
        assert answer["aliased"] >= 0.99 * 2**30, (case, answer)
        assert answer["temporary"] <= 8 * query_bytes + 2**20, (case, answer)
        flops = 4 * tokens * K * case["G"] * case["Q"] * case["C"]
        assert answer["flops"] >= flops, (case, answer)
        read_bytes = tokens * K * 2 * case["C"] * jnp.dtype(case["dtype"]).itemsize
        assert answer["bytes"] >= read_bytes, case


needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="needs the TPU compiler; try pip install 'jaxserve[tpu]'"
)


@needs_libtpu
def test_every_two_options_together_compile_for_tpus(compile_for_chips):
    """And a table beyond scalar memory, in the same process."""
    wide = dict(topology="v5e:2x2", dtype="bfloat16", C=128, S=16, G=4, Q=1)
    wide |= dict(window=None, soft_cap=None, tp=1, B=256, P=2048, K=8)
    cases = [case | ROWS for case in pairwise(FEW_COMPILED, compiles_there)]
    assert_compiled(compile_for_chips([*cases, wide]))


@needs_libtpu
@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("topology", KINDS)
def test_all_options_compile_for_tpus(topology: str, compile_for_chips):
    options = ALL_COMPILED | dict(topology=[topology], window=[4096], soft_cap=[30.0], tp=[1])
    names = list(options)
    cases = [dict(zip(names, c, strict=True)) for c in itertools.product(*options.values())]
    assert_compiled(compile_for_chips([c | ROWS for c in cases if compiles_there(c)]))
