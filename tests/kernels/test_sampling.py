"""Sampling against a float64 full sort, its distributions, and the law that rows never mix.

Dimension key: B rows  V vocabulary  E ids  T tokens  n alternatives
"""

import re
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export

from jaxserve.bench.kernel_check import INTERPRETED
from jaxserve.bench.sampling_check import Filter, reference_weights, row_params
from jaxserve.kernels import backend as backends
from jaxserve.kernels import sampling
from jaxserve.kernels.sampling import N_TOP, NARROW, PROMPT_FLAG

V = 1001  # large enough that both paths exist, and no multiple of a group: padded
NARROW_ROW: Filter = (0.8, 50, 0.95, 0.0)
PURE: Filter = (1.0, 0, 1.0, 0.0)
FLAT_NUCLEUS: Filter = (1.5, 0, 0.99, 0.0)
MANY: Filter = (1.0, 300, 1.0, 0.0)
BACKENDS = ["xla", "pallas_gpu"]


@cache
def jit_sample(backend: str):
    interpreted = backends.is_interpreted(backend)
    options = INTERPRETED if interpreted else None
    return jax.jit(partial(sampling.sample, backend=backend), compiler_options=options)


def draw(
    logits_BV: np.ndarray,
    filters: Sequence[Filter],
    position: int | np.ndarray = 0,
    *,
    backend: str = "xla",
    rows: int = 16,
    **overrides: Sequence[float],
) -> np.ndarray:
    """Tokens of the rows, padded with inactive ones to `rows`: each new shape costs a compile."""
    B = len(logits_BV)
    padding = ((0, max(0, rows - B)),)
    params = jax.tree.map(
        lambda a: jnp.pad(a, padding + ((0, 0),) * (a.ndim - 1)), row_params(filters, **overrides)
    )
    tokens_B, finite_B = jit_sample(backend)(
        jnp.pad(logits_BV, (*padding, (0, 0))),
        params,
        jnp.pad(np.broadcast_to(np.asarray(position, np.int32), (B,)), padding),
        jnp.pad(np.ones(B, bool), padding),
    )
    assert finite_B[:B].all()
    return np.asarray(tokens_B[:B])


def assert_as_reference(
    logits_BV: np.ndarray, filters: Sequence[Filter], position: int = 0, *, backend: str
) -> None:
    """Every token is the one at which the float64 running weight passes the row's uniform."""
    tokens_B = draw(logits_BV, filters, position, backend=backend)
    B = len(filters)
    u_B = sampling.uniforms(jnp.arange(B, dtype=jnp.uint32), jnp.full(B, position))
    for b, (token, u) in enumerate(zip(tokens_B, np.asarray(u_B, np.float64), strict=True)):
        end_V = np.cumsum(reference_weights(logits_BV[b], filters[b]))
        end_V /= end_V[-1]
        begin = end_V[token - 1] if token else 0.0
        assert begin < end_V[token], (b, token, "was filtered out", filters[b])
        assert begin - 1e-5 <= u <= end_V[token] + 1e-5, (b, token, u, filters[b])


FILTERS: list[Filter] = [
    NARROW_ROW,
    PURE,
    FLAT_NUCLEUS,
    MANY,
    (1.0, 2, 1.0, 0.0),
    (1.0, NARROW, 1.0, 0.0),
    (1.0, NARROW + 1, 0.9, 0.0),
    (0.7, 0, 0.5, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (2.0, 0, 0.9, 0.3),
    (1.0, 40, 0.9, 0.02),
    (1.0, 10**6, 0.7, 0.0),
    (1e-6, 0, 1.0, 0.0),
    (50.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 1.0),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("vocabulary", [5, V])
def test_tokens_are_those_of_a_full_sort(vocabulary: int, spread: float, backend: str):
    rng = np.random.default_rng(vocabulary)
    shape = (len(FILTERS), vocabulary)
    logits_BV = rng.normal(0, spread, shape).astype(np.float32)
    for position in range(4):
        assert_as_reference(logits_BV, FILTERS, position, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [0.0625, 0.5, 4.0])
def test_tokens_are_those_of_a_full_sort_among_ties(step: float, backend: str):
    rng = np.random.default_rng(1)
    logits_BV = rng.normal(0, 3, (len(FILTERS), V))
    logits_BV = (np.round(logits_BV / step) * step).astype(np.float32)
    for position in range(4):
        assert_as_reference(logits_BV, FILTERS, position, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    st.lists(st.sampled_from([-np.inf, -40.0, -1.0, 0.0, 0.5, 0.5, 3.0]), min_size=4, max_size=4),
    st.floats(0.01, 10),
    st.integers(0, 9).filter(lambda k: k != 1),
    st.floats(1e-3, 1),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)
def test_a_small_row_is_that_of_a_full_sort(
    backend: str,
    tail: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    position: int,
):
    logits_BV = np.array([[1.0, *tail]], np.float32)
    row = (temperature, top_k, float(np.float32(top_p)), float(np.float32(min_p)))
    assert_as_reference(logits_BV, [row], position, backend=backend)


@pytest.mark.parametrize("row", [NARROW_ROW, PURE, FLAT_NUCLEUS, MANY, (1.0, 0, 1.0, 0.02)])
def test_draws_follow_the_distribution(row: Filter):
    B, num_draws = 64, 64 * 256
    logits_V = np.random.default_rng(3).normal(0, 2, V).astype(np.float32)
    logits_BV = np.tile(logits_V, (B, 1))
    tokens = np.concatenate([draw(logits_BV, [row] * B, position) for position in range(256)])

    p_V = reference_weights(logits_V, row)
    p_V /= p_V.sum()
    counts_V = np.bincount(tokens, minlength=V)
    assert counts_V[p_V == 0].sum() == 0
    rare_V = p_V * num_draws < 10
    observed = np.append(counts_V[~rare_V], counts_V[rare_V].sum())
    expected = np.append(p_V[~rare_V], p_V[rare_V].sum()) * num_draws
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = len(observed) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)  # p < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_batch_mates(backend: str):
    rng = np.random.default_rng(5)
    own_filters = [NARROW_ROW, PURE, FLAT_NUCLEUS, MANY, (0.7, 0, 0.5, 0.0), (0.0, 0, 1.0, 0.0)]
    own_BV = rng.normal(0, 3, (len(own_filters), V)).astype(np.float32)
    seeds = [7, 7, 8, 9, 2**32 - 1, 3]
    alone_B = [
        int(draw(own_BV[b : b + 1], [row], 17, backend=backend, rows=1, seed_B=[seeds[b]])[0])
        for b, row in enumerate(own_filters)
    ]
    for mates in ([(0.0, 0, 1.0, 0.0)], [NARROW_ROW], [PURE], [FLAT_NUCLEUS, MANY]):
        for B in (16, 64):
            at_B = rng.permutation(B)[: len(own_filters)]
            filters = [mates[b % len(mates)] for b in range(B)]
            logits_BV = rng.normal(0, 1, (B, V)).astype(np.float32)
            seed_B = rng.integers(0, 2**32, B)
            logits_BV[at_B], seed_B[at_B] = own_BV, seeds
            for b, row in zip(at_B, own_filters, strict=True):
                filters[b] = row
            tokens_B = draw(logits_BV, filters, 17, backend=backend, seed_B=seed_B)
            assert tokens_B[at_B].tolist() == alone_B, (mates, B)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_and_position_decide_the_draw(backend: str):
    logits_BV = np.zeros((4, V), np.float32)
    again_B, tokens_B = (
        draw(logits_BV, [PURE] * 4, np.array([5, 5, 5, 6]), backend=backend, seed_B=[1, 1, 2, 1])
        for _ in range(2)
    )
    assert tokens_B[0] == tokens_B[1]
    assert len({tokens_B[0], tokens_B[2], tokens_B[3]}) == 3
    assert tokens_B.tolist() == again_B.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("greedy", [(0.0, 0, 1.0, 0.0), (0.0, 50, 0.5, 0.1), (1.0, 1, 1.0, 0.0)])
@pytest.mark.parametrize("mates", [[], [PURE, MANY]])
def test_greedy_takes_the_lowest_of_the_likeliest(
    greedy: Filter, mates: list[Filter], backend: str
):
    logits_BV = np.random.default_rng(0).normal(size=(1 + len(mates), V)).astype(np.float32)
    logits_BV[0, [3, 4, 500, 1000]] = 9.0
    assert draw(logits_BV, [greedy, *mates], backend=backend)[0] == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusable_rows_are_named_and_inactive_ones_not_drawn(backend: str):
    logits_BV = np.zeros((16, V), np.float32)
    logits_BV[1], logits_BV[2, 10], logits_BV[3], logits_BV[4, 1:] = (
        np.nan,
        np.inf,
        -np.inf,
        -np.inf,
    )
    logits_BV[5, 10] = np.nan
    tokens_B, finite_B = jit_sample(backend)(
        jnp.asarray(logits_BV),
        row_params([PURE] * 16),
        jnp.zeros(16, jnp.int32),
        jnp.arange(16) > 0,
    )
    assert finite_B[:5].tolist() == [True, False, False, False, True]
    assert ((tokens_B >= 0) & (tokens_B < V)).all()
    assert tokens_B[0] == 0 and tokens_B[4] == 0
    assert not finite_B[5] or tokens_B[5] != 10


def test_bias_and_penalties_by_hand():
    #            prompt only   output twice    both     unseen   unseen, biased
    logits_BV = [[2.0, -2.0, 1.0, 0.5, 0.0]]
    counts_BV = [[PROMPT_FLAG, 2, PROMPT_FLAG | 1, 0, 0]]
    bias_BV = [[0.0, 0.0, 0.0, 0.0, -100.0]]
    params = row_params(
        [PURE], repetition_B=[2.0], presence_B=[0.25], frequency_B=[0.5], seed_B=[0]
    )
    x_BV = sampling.apply_extras(
        jnp.array(logits_BV), jnp.array(counts_BV, jnp.int32), jnp.array(bias_BV), params
    )
    # repetition halves positive and doubles negative logits of what was seen; then 0.5 per output
    # and 0.25 once for whatever was output.
    expected = [1.0, -4.0 - 2 * 0.5 - 0.25, 0.5 - 0.5 - 0.25, 0.5, -100.0]
    np.testing.assert_allclose(x_BV[0], expected)


def test_extras_that_are_off_change_nothing():
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(2, V)), jnp.float32)
    counts_BV = jnp.full((2, V), PROMPT_FLAG | 3, jnp.int32)
    x_BV = sampling.apply_extras(
        logits_BV, counts_BV, jnp.zeros((2, V), jnp.float32), row_params([PURE] * 2)
    )
    assert (x_BV == logits_BV).all()


def test_counts_keep_prompt_and_output_apart():
    counts_RV = jnp.zeros((3, 8), jnp.int32)
    ids_T = lambda *ids: jnp.array(ids, jnp.int32)  # noqa: E731
    on_T = jnp.array([True, True, True, False])
    counts_RV = sampling.mark_prompt(counts_RV, ids_T(0, 0, 2, 1), ids_T(5, 5, 7, 1), on_T)
    counts_RV = sampling.count_tokens(counts_RV, ids_T(0, 0, 1, 1), ids_T(5, 5, 2, 3), on_T)
    counts_RV = sampling.mark_prompt(counts_RV, ids_T(0, 0, 2, 1), ids_T(5, 5, 7, 1), on_T)
    expected = np.zeros((3, 8), np.int32)
    expected[0, 5], expected[2, 7], expected[1, 2] = PROMPT_FLAG | 2, PROMPT_FLAG, 1
    np.testing.assert_array_equal(counts_RV, expected)


def test_stop_ids_are_banned_until_min_tokens_and_then_stop():
    logits_BV = jnp.zeros((4, 8), jnp.float32)
    params = row_params(
        [PURE] * 4,
        min_tokens_B=[3, 3, 3, 0],
        ignore_eos_B=[False, True, False, False],
        stop_ids_BE=[[6, -1], [6, -1], [-1, -1], [6, -1]],
    )
    eos_ids_E = jnp.array([1, 2], jnp.int32)
    made_B = jnp.array([2, 2, 3, 0], jnp.int32)
    x_BV = sampling.ban_stop_ids(logits_BV, made_B, params, eos_ids_E)
    banned = [np.flatnonzero(np.isneginf(row)).tolist() for row in np.asarray(x_BV)]
    assert banned == [[1, 2, 6], [6], [], []]

    def stops(token: int) -> list[bool]:
        return sampling.is_stop(jnp.full(4, token), params, eos_ids_E).tolist()

    assert stops(6) == [True, True, False, True]
    assert stops(2) == [True, False, True, True]
    assert stops(0) == [False] * 4


@pytest.mark.parametrize("vocabulary", [7, N_TOP, 300, V])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_logprobs_are_those_of_a_full_sort(vocabulary: int, step: float):
    logits_BV = np.random.default_rng(2).normal(0, 3, (5, vocabulary)).astype(np.float32)
    if step:
        logits_BV = np.round(logits_BV / np.float32(step)) * np.float32(step)
    tokens_B = np.arange(5, dtype=np.int32)
    chosen_B, ids_Bn, top_Bn = jax.jit(sampling.token_logprobs)(
        jnp.asarray(logits_BV), jnp.asarray(tokens_B), jnp.bool(True)
    )
    exact_BV = logits_BV - np.log(np.exp(logits_BV.astype(np.float64)).sum(-1, keepdims=True))
    best_Bn = np.argsort(-logits_BV, axis=-1, kind="stable")[:, :N_TOP]
    n = best_Bn.shape[1]
    np.testing.assert_allclose(chosen_B, exact_BV[np.arange(5), tokens_B], atol=1e-5)
    np.testing.assert_array_equal(ids_Bn[:, :n], best_Bn)
    np.testing.assert_allclose(top_Bn[:, :n], np.take_along_axis(exact_BV, best_Bn, 1), atol=1e-5)
    assert (ids_Bn[:, n:] == -1).all() and np.isneginf(top_Bn[:, n:]).all()


def test_logprobs_nobody_wants_are_empty():
    compute = jax.jit(partial(sampling.token_logprobs, jnp.zeros((2, V), jnp.float32)))
    chosen_B, ids_Bn, top_Bn = compute(jnp.zeros(2, jnp.int32), jnp.bool(False))
    assert (chosen_B == 0).all() and (ids_Bn == -1).all() and (top_Bn == 0).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_xla_has_no_code_of_a_cpu_and_no_sort_of_a_vocabulary_on_accelerators(platform):
    def step(x_BV, position_B):
        params = row_params([NARROW_ROW, PURE, MANY])
        active_B = jnp.ones(3, bool)
        tokens_B, finite_B = sampling.sample(x_BV, params, position_B, active_B, backend="xla")
        return tokens_B, finite_B, sampling.token_logprobs(x_BV, tokens_B, jnp.bool_(True))

    shapes = jax.ShapeDtypeStruct((3, V), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    program = export.export(jax.jit(step), platforms=[platform])(*shapes).mlir_module()
    assert "custom_call" not in program
    shapes = re.findall(r'"stablehlo\.sort".*?\}\) : \(tensor<([0-9x]+)x[a-z]', program, re.S)
    assert shapes and max(int(size) for shape in shapes for size in shape.split("x")) < V / 2
