"""The reference is checked against a loop over queries; every backend against the reference."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels.kv_pages import KvPages, RowPages
from jaxserve.kernels.paged_attention import (
    paged_attention,
    paged_attention_reference,
    unsupported,
)
from jaxserve.kernels.quant import quantise
from jaxserve.kernels.ragged_attention import Tiles, ragged_attention

BACKENDS = ("xla", "cpu", "rows")  # rows: xla over row pages
K, G, C, S, P = 2, 3, 16, 8, 5
CAPACITY = P * S


@cache
def jitted(backend, window=None, soft_cap=None, scale=None):
    options = {"window": window, "soft_cap": soft_cap, "scale": scale}

    def call(q_BQHC, pages, table_BP, len_B, start_B, first_page=0):
        if backend == "rows" and isinstance(pages, KvPages):
            pages = as_rows(pages)
        name = "xla" if backend == "rows" else backend
        rest = (table_BP, len_B, start_B)
        return paged_attention(q_BQHC, pages, *rest, first_page=first_page, backend=name, **options)

    return jax.jit(call)


def as_rows(pages: KvPages, dtype=None) -> RowPages:
    """The same keys and values as row pages; rows are longer than they need to be."""
    k_NKSC, v_NKSC = pages.k_NKCS.swapaxes(-1, -2), pages.v_NKSC
    scale_NKZ = None
    if dtype is not None:
        k_NKSC, k_scale_NKS = quantise(k_NKSC, dtype)
        v_NKSC, v_scale_NKS = quantise(v_NKSC, dtype)
        scale_NKZ = jnp.concatenate([k_scale_NKS, v_scale_NKS], axis=-1)
    unused_NKSC = jnp.full_like(v_NKSC, 7)
    return RowPages(jnp.concatenate([k_NKSC, v_NKSC, unused_NKSC], axis=-1), scale_NKZ)


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


def in_float64(q_BQHC, pages, table_BP, len_B, start_B, **options):
    q_BQHC, pages = jax.tree.map(lambda x: np.asarray(x, np.float64), (q_BQHC, pages))
    rest = [np.asarray(x) for x in (table_BP, len_B, start_B)]
    return paged_attention_reference(q_BQHC, pages, *rest, **options)


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


@pytest.mark.parametrize("backend", ["xla", "cpu"])
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


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("Q", "options"), [(1, {"soft_cap": 0.5}), (4, {"window": 11})])
def test_quantised_pages_are_read_with_their_scales(dtype, Q, options):
    """Against float64 over the very numbers that are stored; then close to what was written."""
    q_BQHC, pages, *rest = random_batch(8, [9, 40, 1, 17, 24], Q=Q)
    rows = as_rows(pages, dtype)
    want = in_float64(q_BQHC, rows, *rest, **options)
    for backend in ("reference", "xla"):
        assert_close(np.asarray(jitted(backend, **options)(q_BQHC, rows, *rest)), want)
    assert_close(want, in_float64(q_BQHC, pages, *rest, **options), relative=0.1)


def test_poison_in_unused_slots_of_quantised_pages_does_not_leak():
    q_BQHC, pages, table_BP, len_B, start_B = random_batch(9, [3, 8, 9, 37, 5])
    rows = as_rows(pages, "int8")
    assert rows.scale_NKZ is not None
    used_NS = np.zeros((rows.num_pages, S), bool)
    for row, length in zip(np.asarray(table_BP), np.asarray(len_B), strict=True):
        for t in range(length):
            used_NS[row[t // S], t % S] = True
    bad_N1Z = ~np.concatenate([used_NS, used_NS], axis=1)[:, None]
    poisoned = rows._replace(scale_NKZ=jnp.where(bad_N1Z, jnp.nan, rows.scale_NKZ))
    want = jitted("xla")(q_BQHC, rows, table_BP, len_B, start_B)
    got = jitted("xla")(q_BQHC, poisoned, table_BP, len_B, start_B)
    np.testing.assert_array_equal(got, want)


def test_a_soft_cap_and_a_scale_bend_scores_before_the_softmax():
    batch = random_batch(10, [19])
    pages, table_BP = batch[1], np.asarray(batch[2])
    k_TC = np.concatenate([np.asarray(pages.k_NKCS[p, 0]).T for p in table_BP[0]])[:19]
    v_TC = np.concatenate([np.asarray(pages.v_NKSC[p, 0]) for p in table_BP[0]])[:19]
    scores = 1.5 * np.tanh(k_TC.astype(np.float64) @ np.asarray(batch[0])[0, 0, 0] * 0.7 / 1.5)
    want_C = np.exp(scores) / np.exp(scores).sum() @ v_TC
    got = in_float64(*batch, soft_cap=1.5, scale=0.7)
    np.testing.assert_allclose(got[0, 0, 0], want_C, rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Q", [1, 4])
def test_every_backend_has_soft_cap_and_scale(backend, Q):
    batch = random_batch(11, [7, 40, 16], Q=Q)
    options = {"window": 9, "soft_cap": 1.5, "scale": 0.7}
    assert_close(np.asarray(jitted(backend, **options)(*batch)), in_float64(*batch, **options))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("Q", [1, 4])
def test_page_ids_outside_the_pool_are_read_inside_it(backend, Q):
    q_BQHC, pages, table_BP, len_B, start_B = random_batch(12, [40], Q=Q)

    def attended(page: int) -> np.ndarray:
        return jitted(backend)(q_BQHC, pages, table_BP.at[0, 2].set(page), len_B, start_B)

    inside = [np.asarray(attended(page)) for page in range(pages.num_pages)]
    for outside in (-3, pages.num_pages, 2**31 - 1):
        got = np.asarray(attended(outside))
        assert any(np.array_equal(got, one) for one in inside)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_step_is_its_tiles_and_its_rows(backend):
    """Row 0 has two tiles, row 1 decodes, row 2 is idle, row 3 has a tile; the last is padding."""
    Q, H = 4, K * G
    q_BQHC, pages, table_BP, *_ = random_batch(13, [1, 1, 1, 1], Q=6)
    if backend == "rows":
        pages = as_rows(pages)
    q_XHC = q_BQHC.reshape(-1, H, C)[: 4 * Q + 4]
    tiles = Tiles(jnp.array([0, 0, 3, 0]), jnp.array([8, 12, 0, 0]), jnp.array([4, 3, 4, 0]))
    length_B = jnp.array([0, 21, 0, 0])
    name = "xla" if backend == "rows" else backend
    ragged = jax.jit(partial(ragged_attention, backend=name, window=13))
    got_XHC = np.asarray(ragged(q_XHC, pages, table_BP, tiles, length_B))
    assert np.isfinite(got_XHC).all()

    def alone(x: int, row: int, position: int):
        at = slice(row, row + 1)
        one = jnp.array([position])
        block = in_float64(q_XHC[None, x : x + 1], pages, table_BP[at], one + 1, one, window=13)
        return block[0, 0]

    for tile, (row, start, valid) in enumerate(zip(*map(np.asarray, tiles), strict=True)):
        for i in range(valid):
            assert_close(got_XHC[tile * Q + i], alone(tile * Q + i, row, start + i))
    assert_close(got_XHC[4 * Q + 1], alone(4 * Q + 1, 1, 20))
    decode = ragged(q_XHC[-4:], pages, table_BP, Tiles(*(x[:0] for x in tiles)), length_B)
    np.testing.assert_array_equal(decode, got_XHC[-4:])


@pytest.mark.parametrize(
    ("backend", "Q"), [("pallas_gpu", 1), *itertools.product(BACKENDS, (1, 3))]
)
def test_a_table_counts_from_the_first_page(backend, Q):
    """And ids that then lie outside the pool are read as some page of it."""
    q_BQHC, pages, table_BP, *rest = random_batch(11, [5, 0, CAPACITY], Q=Q)
    if backend == "pallas_gpu":
        pages = as_rows(pages)
        pages = RowPages(pages.kv_NKSD[..., : 2 * C], None)
    run = jitted(backend)
    want = run(q_BQHC, pages, table_BP, *rest)
    for shift in (-3, 5):
        got = run(q_BQHC, pages, table_BP - shift, *rest, jnp.int32(shift))
        np.testing.assert_array_equal(got, want)
    assert jnp.isfinite(run(q_BQHC, pages, table_BP, *rest, jnp.int32(1000))).all()


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"soft_cap": -5.0}])
@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_a_scale_and_a_soft_cap_are_positive(backend, options):
    with pytest.raises(ValueError, match=r"(scale|soft_cap): got -?[05].0; allowed: above 0"):
        paged_attention(*random_batch(7, [4]), backend=backend, **options)


def test_pages_that_a_backend_does_not_read_are_refused():
    q_BQHC, pages, *rest = random_batch(7, [4])
    with pytest.raises(ValueError, match="'cpu' reads KvPages, got RowPages; 'xla' reads either"):
        paged_attention(q_BQHC, as_rows(pages), *rest, backend="cpu")
    with pytest.raises(ValueError, match="'pallas_gpu' reads RowPages, got KvPages"):
        paged_attention(q_BQHC, pages, *rest, backend="pallas_gpu")


def test_what_the_cpu_kernel_does_not_take_is_said_with_what_it_does():
    fits = {"head_dim": 64, "page_size": 16, "dtype": "float32", "group": 3}
    assert unsupported("cpu", **fits) is None
    for change, message in (
        ({"head_dim": 20}, "head_dim: got 20; allowed: multiples of 8"),
        ({"page_size": 24}, "page_size: got 24; allowed: powers of two from 8 on"),
        ({"dtype": "int8"}, "kv_dtype: got 'int8'; allowed: float32, bfloat16"),
    ):
        assert unsupported("cpu", **(fits | change)) == message
        assert unsupported("xla", **(fits | change)) is None
