from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.kernels.kv_pages import KvPages, copy_pages, init_pages, read_pages, write_kv


def random_pages(rng, *, N=5, K=2, C=8, S=8) -> KvPages:
    return KvPages(
        jnp.asarray(rng.standard_normal((N, K, C, S), dtype=np.float32)),
        jnp.asarray(rng.standard_normal((N, K, S, C), dtype=np.float32)),
    )


def test_what_is_written_is_read_back_in_token_order():
    rng = np.random.default_rng(0)
    pages = init_pages(4, page_size=8, kv_heads=2, head_dim=16)
    k_TKC, v_TKC = (
        jnp.asarray(rng.standard_normal((3, 2, 16), dtype=np.float32)) for _ in range(2)
    )
    pages = write_kv(pages, k_TKC, v_TKC, jnp.array([2, 2, 0]), jnp.array([6, 7, 0]))
    k_MSKC, v_MSKC = read_pages(pages, jnp.array([2, 0]))
    for got_MSKC, want_TKC in ((k_MSKC, k_TKC), (v_MSKC, v_TKC)):
        np.testing.assert_array_equal(got_MSKC[0, 6:], want_TKC[:2])
        np.testing.assert_array_equal(got_MSKC[1, 0], want_TKC[2])
        assert np.count_nonzero(got_MSKC) == want_TKC.size


@pytest.mark.parametrize("page", [5, 2**31 - 1, -1, -5])
def test_a_page_outside_the_pool_drops_the_write(page):
    pages = random_pages(np.random.default_rng(1))
    ones_TKC = jnp.ones((1, 2, 8))
    after = write_kv(pages, ones_TKC, ones_TKC, jnp.array([page]), jnp.array([3]))
    jax.tree.map(np.testing.assert_array_equal, after, pages)


def test_writing_in_a_donated_loop_copies_no_pool():
    pages = init_pages(256, page_size=16, kv_heads=2, head_dim=64)

    @partial(jax.jit, donate_argnums=0)
    def run(pages, steps):
        def step(i, pages):
            kv_TKC = jnp.full((4, 2, 64), i, jnp.float32)
            return write_kv(pages, kv_TKC, kv_TKC, jnp.arange(4) + i, jnp.full(4, i % 16))

        return lax.fori_loop(0, steps, step, pages)

    memory = run.lower(pages, 3).compile().memory_analysis()
    assert memory.temp_size_in_bytes < pages.k_NKCS.nbytes / 10


def test_copied_pages_read_all_sources_first_and_drop_targets_outside():
    pages = random_pages(np.random.default_rng(2))
    after = copy_pages(pages, jnp.array([0, 1, 2]), jnp.array([1, 0, 9]))
    for x, y in zip(pages, after, strict=True):
        np.testing.assert_array_equal(y[0], x[1])
        np.testing.assert_array_equal(y[1], x[0])
        np.testing.assert_array_equal(y[2:], x[2:])


def test_sizes_the_kernels_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="got 24; try 16 or 32"):
        init_pages(1, page_size=24, kv_heads=1, head_dim=64)
    with pytest.raises(ValueError, match="got 20; try 64 or 128"):
        init_pages(1, page_size=16, kv_heads=1, head_dim=20)
