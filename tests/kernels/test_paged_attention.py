"""The reference is checked against a loop over queries; every backend against the reference."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels.kv_pages import KvPages
from jaxserve.kernels.paged_attention import paged_attention, paged_attention_reference

BACKENDS = ("xla", "cpu")
K, G, C, S, P = 2, 3, 16, 8, 5
CAPACITY = P * S


@cache
def jitted(backend, window=None):
    return jax.jit(partial(paged_attention, backend=backend, window=window))


def random_batch(seed, lengths, *, Q=1, dtype=jnp.float32):
    """Queries, pages and shuffled tables for rows whose blocks end at their lengths."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    N = B * P + 2
    pages = KvPages(
        jnp.asarray(rng.standard_normal((N, K, C, S)), dtype),
        jnp.asarray(rng.standard_normal((N, K, S, C)), dtype),
    )
    q_BQHC = jnp.asarray(rng.standard_normal((B, Q, K * G, C), dtype=np.float32))
    table_BP = jnp.asarray(rng.permutation(N)[: B * P].reshape(B, P).astype(np.int32))
    len_B = jnp.asarray(lengths, jnp.int32)
    return q_BQHC, pages, table_BP, len_B, jnp.maximum(len_B - Q, 0)


def in_float64(q_BQHC, pages, table_BP, len_B, start_B, *, window=None):
    wide = [np.asarray(x, np.float64) for x in (q_BQHC, *pages)]
    rest = [np.asarray(x) for x in (table_BP, len_B, start_B)]
    pages = KvPages(wide[1], wide[2])  # pyright: ignore
    return paged_attention_reference(wide[0], pages, *rest, window=window)


def assert_close(got, want, *, relative=1e-5):
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= relative * np.abs(want).max()


def test_the_reference_is_softmax_attention_over_the_row_so_far():
    batch = random_batch(0, [19], Q=4)
    pages = batch[1]
    q_BQHC, table_BP, start_B = (np.asarray(batch[i]) for i in (0, 2, 4))
    k_TKC = np.concatenate([np.asarray(pages.k_NKCS[p]).transpose(2, 0, 1) for p in table_BP[0]])
    v_TKC = np.concatenate([np.asarray(pages.v_NKSC[p]).transpose(1, 0, 2) for p in table_BP[0]])
    out_BQHC = in_float64(*batch)
    for i in range(4):
        n = start_B[0] + i + 1
        for h in range(K * G):
            scores = k_TKC[:n, h // G].astype(np.float64) @ q_BQHC[0, i, h] * C**-0.5
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(out_BQHC[0, i, h], weights @ v_TKC[:n, h // G], rtol=1e-9)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("window", [None, 1, 11])
@pytest.mark.parametrize("Q", [1, 4])
@settings(max_examples=8)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, CAPACITY), min_size=5, max_size=5))
def test_ragged_batches_agree_with_float64(backend, Q, window, seed, lengths):
    batch = random_batch(seed, lengths, Q=Q)
    got = np.asarray(jitted(backend, window)(*batch))
    assert_close(got, in_float64(*batch, window=window))


def test_a_window_leaves_the_newest_keys():
    q_BQHC, pages, table_BP, len_B, start_B = random_batch(3, [19])
    newest = table_BP[:, 1:], len_B - S, start_B - S  # positions 8 to 18: the newest 11
    want = in_float64(q_BQHC, pages, *newest)
    assert_close(in_float64(q_BQHC, pages, table_BP, len_B, start_B, window=11), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_one_whole_pages_and_a_full_table(backend):
    batch = random_batch(1, [1, S, 2 * S, CAPACITY, CAPACITY - 1])
    assert_close(np.asarray(jitted(backend)(*batch)), in_float64(*batch))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Q", [1, 4])
def test_poison_in_unused_slots_and_pages_does_not_leak(backend, Q):
    q_BQHC, pages, table_BP, len_B, start_B = random_batch(2, [3, S, S + 1, 37, 5], Q=Q)
    k_NKCS, v_NKSC = (np.array(x) for x in pages)
    used_NS = np.zeros((k_NKCS.shape[0], S), bool)
    for row, length in zip(np.asarray(table_BP), np.asarray(len_B), strict=True):
        for t in range(length):
            used_NS[row[t // S], t % S] = True
    k_NKCS.transpose(0, 3, 1, 2)[~used_NS] = np.nan
    v_NKSC.transpose(0, 2, 1, 3)[~used_NS] = np.nan
    poisoned = KvPages(jnp.asarray(k_NKCS), jnp.asarray(v_NKSC))
    want = jitted(backend)(q_BQHC, pages, table_BP, len_B, start_B)
    got = jitted(backend)(q_BQHC, poisoned, table_BP, len_B, start_B)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_past_the_length_and_empty_rows_stay_finite(backend):
    q_BQHC, pages, table_BP, _, _ = random_batch(3, [1] * 5, Q=4)
    batch = (q_BQHC, pages, table_BP, jnp.array([10, 0, 3, 40, 1]), jnp.array([8, 0, 0, 36, 0]))
    got = np.asarray(jitted(backend)(*batch))
    want = in_float64(*batch)
    assert np.isfinite(got).all()
    assert not got[1].any()
    for b, valid in enumerate([2, 0, 3, 4, 1]):
        np.testing.assert_allclose(got[b, :valid], want[b, :valid], rtol=1e-4, atol=1e-5)
    one = jitted(backend)(q_BQHC[:, :1], *batch[1:])
    assert not np.asarray(one)[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Q", [1, 4])
def test_a_row_has_the_same_bits_in_any_batch(backend, Q):
    q_BQHC, pages, table_BP, len_B, start_B = random_batch(4, [7, 40, 16, 33, 21], Q=Q)
    together = jitted(backend)(q_BQHC, pages, table_BP, len_B, start_B)
    for b in range(5):
        at = slice(b, b + 1)
        alone = jitted(backend)(q_BQHC[at], pages, table_BP[at], len_B[at], start_B[at])
        np.testing.assert_array_equal(alone[0], together[b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_page_id_changes_the_result(backend):
    q_BQHC, pages, table_BP, len_B, start_B = random_batch(5, [40, 40, 40, 40, 40])
    right = jitted(backend)(q_BQHC, pages, table_BP, len_B, start_B)
    wrong = jitted(backend)(q_BQHC, pages, table_BP.at[2, 3].set(1), len_B, start_B)
    changed_B = np.asarray(right != wrong).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed_B, np.arange(5) == 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Q", [1, 4])
def test_bfloat16_pages_are_summed_in_float32(backend, Q):
    batch = random_batch(6, [9, 40, 1, 17, 24], Q=Q, dtype=jnp.bfloat16)
    assert_close(np.asarray(jitted(backend)(*batch)), in_float64(*batch))


def test_heads_that_do_not_fit_the_pages_are_refused():
    q_BQHC, *rest = random_batch(7, [4])
    with pytest.raises(ValueError, match="pages hold 2 kv heads of 16 channels, got 5 query heads"):
        paged_attention(q_BQHC[:, :, :5], *rest)
