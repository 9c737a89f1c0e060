"""The GPU's sampling kernel, interpreted, beside XLA's path; and lowered for CUDA.

What either is held to by itself, a full sort in float64 among it, is in test_sampling.py.

Dimension key: B rows  V vocabulary
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.kernel_check import INTERPRETED, TRITON_CALL, lower_for_cuda
from jaxserve.bench.sampling_check import Filter, row_params, wrong_rows
from jaxserve.kernels import sampling, sampling_gpu

B = 8
VOCABULARIES = [65, 777, 2500]  # 2 chunks, 7 and 5, and one id, 9 and 452 in the last of them
NUMBERS: dict[str, Any] = {
    "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 50.0]),
    "top_k": st.sampled_from([0, 0, 1, 2, 40, 64, 65, 500, 10**6]),
    "top_p": st.sampled_from([1.0, 1.0, 0.95, 0.5, 1e-9]),
    "min_p": st.sampled_from([0.0, 0.0, 0.02, 1.0]),
}


@cache
def sample(backend: str):
    return jax.jit(partial(sampling.sample, backend=backend), compiler_options=INTERPRETED)


def assert_same(logits_BV: np.ndarray, filters: list[Filter], active_B: np.ndarray, position: int):
    """Both say the same, but for draws that rounding may hand to the next kept token."""
    params, position_B = row_params(filters), jnp.full(B, position, jnp.int32)
    got, want = (
        sample(backend)(logits_BV, params, position_B, active_B)
        for backend in ("pallas_gpu", "xla")
    )
    u_B = sampling.uniforms(params.seed_B, position_B)
    assert list(wrong_rows(logits_BV, filters, active_B, u_B, got, want)) == [], filters


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**31 - 1),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    step=st.sampled_from([0.0, 0.0, 0.5, 4.0]),
    banned=st.sampled_from([0.0, 0.0, 0.3, 0.99]),
    filters=st.lists(st.tuples(*NUMBERS.values()), min_size=B, max_size=B),
    active=st.lists(st.booleans(), min_size=B, max_size=B),
)
def test_tokens_equal_those_of_xla(
    vocabulary: int,
    seed: int,
    spread: float,
    step: float,
    banned: float,
    filters: list[Filter],
    active: list[bool],
):
    rng = np.random.default_rng(seed)
    logits_BV = rng.normal(0, spread, (B, vocabulary)).astype(np.float32)
    if step:
        logits_BV = np.round(logits_BV / np.float32(step)) * np.float32(step)
    logits_BV[rng.random(logits_BV.shape) < banned] = -np.inf
    assert_same(logits_BV, filters, np.array(active), seed)


def test_a_row_whose_walk_takes_several_steps_a_chunk():
    """Questions of a large vocabulary are asked of fewer lanes at a time than a chunk has."""
    vocabulary = 16_500
    assert sampling_gpu._Cut(vocabulary).W < sampling_gpu._Cut(vocabulary).G
    logits_BV = np.random.default_rng(3).normal(0, 1, (B, vocabulary)).astype(np.float32)
    wide: list[Filter] = [(1.0, 500, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (2.0, 3000, 0.5, 0.0)]
    assert_same(logits_BV, (wide * B)[:B], np.ones(B, bool), 5)


@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (1.0, 40, 0.9, 0.0), (1.0, 500, 0.9, 0.0)])
@pytest.mark.parametrize("where", [0, 130, 776])
def test_a_nan_anywhere_ends_its_row_and_no_other(filters: Filter, where: int):
    logits_BV = np.random.default_rng(0).normal(0, 3, (B, 777)).astype(np.float32)
    logits_BV[1, where] = np.nan
    tokens_B, finite_B = sample("pallas_gpu")(
        logits_BV, row_params([filters] * B), jnp.zeros(B, jnp.int32), np.ones(B, bool)
    )
    np.testing.assert_array_equal(finite_B, np.arange(B) != 1)
    assert 0 <= tokens_B[1] < 777


def test_a_vocabulary_without_a_kernel_is_refused_with_those_that_have_one():
    message = "vocabulary: got 524289; allowed: up to 524288"
    assert sampling.unsupported("pallas_gpu", vocabulary=2**19) is None
    assert sampling.unsupported("pallas_gpu", vocabulary=2**19 + 1) == message
    assert sampling.unsupported("pallas_tpu", vocabulary=2**19 + 1) is None
    with pytest.raises(ValueError, match=message):
        lowered_for_cuda(2**19 + 1)


# -- For CUDA, without a GPU ---------------------------------------------------------------------


def lowered_for_cuda(vocabulary: int) -> str:
    def step(logits_BV: jax.Array, position_B: jax.Array, active_B: jax.Array):
        params = row_params([(1.0, 0, 1.0, 0.0)] * B)
        return sampling.sample(logits_BV, params, position_B, active_B, backend="pallas_gpu")

    shape = jax.ShapeDtypeStruct
    operands = shape((B, vocabulary), "float32"), shape((B,), "int32"), shape((B,), "bool")
    return lower_for_cuda(jax.jit(step), *operands)


@pytest.mark.parametrize("vocabulary", [1, 777, 32_000, 151_936, 2**19])
def test_a_step_is_one_launch_and_no_loop_of_the_host_for_cuda(vocabulary: int):
    program = lowered_for_cuda(vocabulary)
    assert program.count(TRITON_CALL) == 1
    assert "stablehlo.while" not in program and "stablehlo.case" not in program


def test_chunks_cover_the_row_and_their_lanes_fill_threads():
    for vocabulary in (1, *VOCABULARIES, 4096, 32_000, 128_256, 151_936, 262_208, 2**19):
        cut = sampling_gpu._Cut(vocabulary)
        assert cut.M * cut.G // 2 < vocabulary <= cut.M * cut.G or cut.M == 1
        assert cut.G >= sampling.NARROW and cut.G % cut.W == 0
        assert cut.G <= 16 * 32 * cut.num_warps
