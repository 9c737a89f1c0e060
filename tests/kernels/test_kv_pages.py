import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels.kv_pages import KvPages, RowPages, copy_pages, init_pages, init_row_pages

N, K, S, C = 5, 2, 8, 8


def random_pages(rng) -> tuple[KvPages, RowPages]:
    """Pages of both layouts; numbers of the second are quantised."""

    def numbers(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

    return (
        KvPages(numbers(N, K, C, S), numbers(N, K, S, C)),
        RowPages(
            jnp.asarray(rng.integers(-127, 128, (N, K, S, 2 * C)), jnp.int8), numbers(N, K, 2 * S)
        ),
    )


@pytest.mark.parametrize("layout", [0, 1])
def test_copied_pages_read_all_sources_first_and_drop_targets_outside(layout):
    pages = random_pages(np.random.default_rng(2))[layout]
    after = copy_pages(pages, jnp.array([0, 1, 2, 3]), jnp.array([1, 0, 9, -1]))
    assert type(after) is type(pages)
    for x, y in zip(jax.tree.leaves(pages), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(y[0], x[1])
        np.testing.assert_array_equal(y[1], x[0])
        np.testing.assert_array_equal(y[2:], x[2:])


@pytest.mark.parametrize("init", [init_pages, init_row_pages])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_tell_their_sizes_and_hold_nothing_else(init, dtype):
    pages = init(3, page_size=16, kv_heads=2, head_dim=64, dtype=dtype)
    assert (pages.num_pages, pages.page_size) == (3, 16)
    sizes = [x.nbytes for x in jax.tree.leaves(pages)]
    assert sum(sizes) == 2 * 3 * 2 * 16 * 64 * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_row_pages_have_a_scale_for_each_key_and_value(dtype):
    pages = init_row_pages(3, page_size=16, kv_heads=2, head_dim=64, dtype=dtype)
    assert pages.scale_NKZ is not None and pages.scale_NKZ.shape == (3, 2, 32)
    assert pages.kv_NKSD.dtype == dtype and pages.kv_NKSD.shape == (3, 2, 16, 128)


def test_sizes_and_types_the_layout_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="got 24; try 16 or 32"):
        init_pages(1, page_size=24, kv_heads=1, head_dim=64)
    with pytest.raises(ValueError, match="got 20; try 64 or 128"):
        init_pages(1, page_size=16, kv_heads=1, head_dim=20)
    with pytest.raises(ValueError, match="KvPages hold no int8; RowPages do"):
        init_pages(1, page_size=16, kv_heads=1, head_dim=64, dtype="int8")
