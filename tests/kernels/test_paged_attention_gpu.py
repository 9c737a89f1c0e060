"""The GPU kernels, interpreted, against a float64 loop over queries; and lowered for CUDA."""

import itertools
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.kernel_check import (
    INTERPRETED,
    MATRIX,
    TRITON_CALL,
    VALUES,
    Batch,
    Options,
    check,
    limit,
    lower_for_cuda,
    worst_error,
)
from jaxserve.kernels import paged_attention_gpu
from jaxserve.kernels.block_sizes import DecodeBlocks, GpuBlocks, TileBlocks
from jaxserve.kernels.kv_pages import RowPages

# Small enough that short rows have several pieces, several steps each, and tiles several programs.
SMALL = GpuBlocks(
    DecodeBlocks(step_keys=16, piece_keys=32, most_pieces=4, programs=5, num_warps=4, num_stages=2),
    TileBlocks(step_keys=16, rows=16, num_warps=4, num_stages=2),
)
PAIRWISE = (
    (1, 96, 128, "float32", 1, 50, None),
    (16, 80, 16, "bfloat16", 7, None, 5.0),
    (1, 64, 64, "float8_e4m3fn", 4, None, None),
    (16, 128, 32, "float8_e4m3fn", 1, 50, 5.0),
    (16, 256, 16, "int8", 4, 50, None),
    (1, 128, 128, "int8", 7, None, 5.0),
    (1, 256, 32, "bfloat16", 7, 50, None),
    (16, 96, 64, "float32", 7, 50, 5.0),
    (1, 80, 32, "float32", 4, None, 5.0),
    (16, 64, 128, "bfloat16", 1, 50, 5.0),
    (16, 80, 64, "int8", 1, 50, None),
    (16, 256, 128, "float8_e4m3fn", 1, None, 5.0),
    (1, 96, 16, "float8_e4m3fn", 1, None, 5.0),
    (1, 128, 64, "bfloat16", 4, None, 5.0),
    (16, 128, 16, "float32", 7, 50, None),
    (1, 96, 32, "int8", 4, 50, None),
    (16, 80, 128, "float8_e4m3fn", 7, None, 5.0),
    (1, 64, 32, "int8", 7, None, None),
    (1, 256, 64, "float32", 1, None, None),
    (16, 96, 128, "bfloat16", 4, 50, None),
    (1, 64, 16, "float32", 7, None, None),
)


@cache
def attend(window=None, soft_cap=None, scale=None):
    options = dict(window=window, soft_cap=soft_cap, scale=scale, interpret=True, blocks=SMALL)
    return jax.jit(partial(paged_attention_gpu.attend, **options), compiler_options=INTERPRETED)


def check_options(options):
    error = check(Options(*options), interpret=True, blocks=SMALL, longest=160)
    assert error <= limit(options[3])


def test_every_pair_of_options_is_chosen():
    for (i, one), (j, other) in itertools.combinations(enumerate(VALUES.values()), 2):
        chosen = {(case[i], case[j]) for case in PAIRWISE}
        assert chosen >= set(itertools.product(one, other)), (i, j)


@pytest.mark.parametrize("options", PAIRWISE, ids=str)
def test_options_agree_with_float64(options):
    check_options(options)


@pytest.mark.full
@pytest.mark.parametrize("options", MATRIX, ids=str)
def test_all_options_agree_with_float64(options):
    check_options(options)


@pytest.mark.parametrize(("Q", "window"), [(1, None), (5, 21)])
@settings(max_examples=5)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(0, 96), min_size=5, max_size=5))
def test_ragged_batches_agree_with_float64(Q, window, seed, lengths):
    batch = Batch(seed, lengths, Q=Q, window=window)
    assert worst_error(attend(window)(*batch.operands()), batch.reference()) <= 1e-5


def test_blocks_may_begin_anywhere_in_their_row_and_end_past_it():
    batch = Batch(1, [40, 10, 3, 96, 0], Q=16)
    batch.start_B[:] = [7, 8, 0, 16, 0]
    assert worst_error(attend()(*batch.operands()), batch.reference()) <= 1e-5


@pytest.mark.parametrize("Q", [1, 5])
def test_float32_queries_keep_their_digits_over_narrow_pages_at_any_scale(Q):
    batch = Batch(3, [33, 96], Q=Q, stored="bfloat16")
    batch.q_BQHC = np.random.default_rng(0).standard_normal(batch.q_BQHC.shape, np.float32)
    got = attend(scale=0.3)(*batch.operands())
    assert worst_error(got, batch.reference(scale=0.3)) <= 1e-5


@pytest.mark.parametrize("Q", [1, 5])
def test_a_permuted_page_id_is_seen(Q):
    batch = Batch(4, [96] * 5, Q=Q)
    right, want = attend()(*batch.operands()), batch.reference()
    wrong_BP = batch.table_BP.copy()
    wrong_BP[2, [1, 4]] = wrong_BP[2, [4, 2]]
    wrong = attend()(*batch.operands(table_BP=wrong_BP))
    changed_B = np.asarray(right != wrong).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed_B, np.arange(5) == 2)
    assert worst_error(wrong, want) > 1e-2


@pytest.mark.parametrize(("Q", "S"), [(1, 8), (5, 32)])
def test_page_ids_outside_the_pool_are_clamped_and_those_past_the_length_unused(Q, S):
    batch = Batch(5, [20, 33, 48], Q=Q, S=S)
    batch.table_BP[1, :2] = [0, len(batch.kv_NKSD) - 1]
    batch.kv_NKSD = np.nan_to_num(batch.kv_NKSD)
    used_BP = np.arange(6) * S < batch.len_B[:, None]
    wild_BP = np.where(used_BP, batch.table_BP, [[2**31 - 1, -(2**31), -1] * 2])
    wild_BP[1, :2] = [-7, len(batch.kv_NKSD)]
    wild = attend()(*batch.operands(table_BP=wild_BP.astype(np.int32)))
    np.testing.assert_array_equal(wild, attend()(*batch.operands()))


@pytest.mark.parametrize("Q", [1, 5])
def test_a_row_has_the_same_bits_in_any_batch_and_any_table(Q):
    batch = Batch(6, [7, 96, 33, 0, 64], Q=Q)
    together = attend()(*batch.operands())
    padding_BP = np.zeros((5, 10), np.int32)
    wide_BP = np.concatenate([batch.table_BP, padding_BP], axis=1)
    np.testing.assert_array_equal(attend()(*batch.operands(table_BP=wide_BP)), together)
    for b in (0, 1, 4):
        alone = attend()(*batch.operands(slice(b, b + 1)))
        np.testing.assert_array_equal(alone[0], together[b])


def test_sizes_without_a_kernel_are_refused_with_those_that_have_one():
    fits: dict[str, Any] = dict(head_dim=128, page_size=64, dtype="bfloat16", group=4)
    reason = paged_attention_gpu.unsupported
    assert reason(**fits) is None
    assert "got 72; allowed: multiples of 16" in str(reason(**{**fits, "head_dim": 72}))
    assert "got 48; allowed: powers of two" in str(reason(**{**fits, "page_size": 48}))
    assert "got float16; allowed: float32, bfloat16" in str(reason(**{**fits, "dtype": "float16"}))
    assert "got 129; allowed: 1 to 32" in str(reason(**{**fits, "group": 129}))
    with pytest.raises(ValueError, match="head_dim: got 72"):
        attend()(*Batch(7, [4], C=72).operands())


def test_a_pool_whose_offsets_overflow_is_refused():
    with pytest.raises(ValueError, match="got a pool of 3.0 GiB of int8; allowed: less than 2 GiB"):
        lowered_for_cuda(1, 128, 64, "int8", 4, None, None, N=3 * 2**30 // (8 * 64 * 256))


# -- For CUDA, without a GPU ---------------------------------------------------------------------


def lowered_for_cuda(Q, C, S, stored, G, window, soft_cap, *, N=1024):
    """The program as text, lowered with the default block sizes for a real size of batch."""
    shape: Any = jax.ShapeDtypeStruct
    B, heads, P = 64, 8, 256
    narrow = jnp.dtype(stored).itemsize == 1
    pages = RowPages(
        shape((N, heads, S, 2 * C), stored),
        shape((N, heads, 2 * S), jnp.float32) if narrow else None,
    )
    wide = jnp.float32 if stored == "float32" else jnp.bfloat16
    operands = (
        shape((B, Q, heads * G, C), wide),
        pages,
        shape((B, P), jnp.int32),
        shape((B,), jnp.int32),
        shape((B,), jnp.int32),
    )
    function = jax.jit(
        partial(paged_attention_gpu.attend, window=window, soft_cap=soft_cap, scale=None)
    )
    return lower_for_cuda(function, *operands)


def check_lowered(Q, *options):
    calls = lowered_for_cuda(Q, *options).count(TRITON_CALL)
    assert calls == (2 if Q == 1 else 1)  # attention and, for decode, the join


@pytest.mark.parametrize("options", PAIRWISE, ids=str)
def test_options_lower_for_cuda(options):
    check_lowered(*options)


@pytest.mark.full
@pytest.mark.parametrize("options", MATRIX, ids=str)
def test_all_options_lower_for_cuda(options):
    check_lowered(*options)


# -- Compiled for GPUs that are not there ---------------------------------------------------------

# Pages of the default size: every type and both kernels. The assembler takes a second for each.
FEW_COMPILED = tuple(case for case in PAIRWISE if case[2] == 64)
needs_ptxas = pytest.mark.skipif(
    find_spec("jax_plugins") is None or find_spec("nvidia") is None,
    reason="needs NVIDIA's compilers; try pip install 'jaxserve[gpu-compile]'",
)


def chip_case(options, topology) -> dict[str, Any]:
    case = Options(*options)._asdict() | dict(topology=topology, tp=1, B=64, P=256, K=8)
    short = dict(queries="Q", head_dim="C", page_size="S", stored="dtype", group="G")
    return {short.get(name, name): value for name, value in case.items()}


def assert_compiled(answers) -> None:
    """In place, and in registers, but for 64 bytes of a thread: nothing beside 250 registers."""
    for case, answer in answers:
        names = {kernel["name"] for kernel in answer["kernels"]}
        one_query = {"paged_attention_decode", "paged_attention_join"}
        assert names == {"kv_write"} | (one_query if case["Q"] == 1 else {"paged_attention_tiles"})
        assert answer["aliased"] >= 0.99 * 2**30, (case, answer)
        assert answer["temporary"] < 2**28, (case, answer)  # the parts of rows, and no copied pool
        for kernel in answer["kernels"]:
            assert kernel["spilled_bytes"] <= 64, (case, kernel)
            assert 0 < kernel["registers"] <= 255 and kernel["shared_bytes"] <= 227 << 10


@needs_ptxas
def test_options_compile_for_gpus(compile_for_chips):
    """And sampling, for the vocabulary of Llama 3 and the largest that has a kernel."""
    sampled = [dict(topology="h200:1", B=64, V=vocabulary) for vocabulary in (128_256, 1 << 19)]
    answers = compile_for_chips([chip_case(c, "h200:1") for c in FEW_COMPILED] + sampled)
    assert_compiled(answers[: len(FEW_COMPILED)])
    for case, answer in answers[len(FEW_COMPILED) :]:
        [kernel] = answer["kernels"]
        assert kernel["name"] == "sample" and kernel["spilled_bytes"] == 0, (case, kernel)


@needs_ptxas
@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stored", VALUES["stored"])
def test_all_options_compile_for_gpus(stored, compile_for_chips):
    chosen = [options for options in MATRIX if options.stored == stored]
    assert_compiled(compile_for_chips([chip_case(case, "h200:1") for case in chosen]))


@needs_ptxas
@pytest.mark.full
def test_pairs_of_options_compile_for_older_gpus(compile_for_chips):
    has = [case for case in PAIRWISE if case[3] != "float8_e4m3fn"]
    assert_compiled(compile_for_chips([chip_case(case, "a100:1") for case in has]))
