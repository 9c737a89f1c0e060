"""Laws of the quantised rows, over rows of very different size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.kernels.quant import LARGEST, dequantise, is_quantised, quantise, scale_bytes

DTYPES = tuple(LARGEST)
ROWS, C = 6, 16

quantised = jax.jit(quantise, static_argnums=1)


def there_and_back(x_RC, dtype: str) -> np.ndarray:
    return np.asarray(dequantise(*quantised(jnp.asarray(x_RC, jnp.float32), dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 9999), exponents=st.lists(st.integers(-30, 30), min_size=6, max_size=6))
def test_the_error_of_an_entry_is_bounded_by_its_own_row(dtype, seed, exponents):
    scale_R1 = 10.0 ** np.array(exponents)[:, None]
    x_RC = np.random.default_rng(seed).standard_normal((ROWS, C)) * scale_R1
    amax_R1 = np.abs(x_RC).max(axis=1, keepdims=True)
    error_RC = np.abs(there_and_back(x_RC, dtype) - x_RC)
    if dtype == "int8":
        bound_RC = amax_R1 / 127 / 2
    else:
        bound_RC = np.maximum(np.abs(x_RC) / 16, amax_R1 / 448 * 2.0**-10)
    assert (error_RC <= bound_RC * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_the_type_holds_come_back_exactly(dtype):
    held = np.arange(-128, 128, dtype=np.int8).view(dtype).astype(np.float32)
    held_C = held[np.isfinite(held) & (np.abs(held) <= LARGEST[dtype])]
    x_RC = held_C[None] * 2.0 ** np.array([[-60.0], [0.0], [7.0]])
    np.testing.assert_array_equal(there_and_back(x_RC, dtype), x_RC.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_scale_of_their_own_have_scale_one_and_read_zero(dtype):
    x_RC = np.zeros((2, C))
    x_RC[1, 3] = 1e-40  # below the least normal number
    stored_RC, scale_R = quantised(jnp.asarray(x_RC, jnp.float32), dtype)
    np.testing.assert_array_equal(scale_R, 1.0)
    assert not np.asarray(stored_RC, np.float32).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_faulty_row_reads_as_nan_and_leaves_the_others_alone(dtype, poison):
    x_RC = np.random.default_rng(0).standard_normal((ROWS, C))
    want_RC = there_and_back(x_RC, dtype)
    x_RC[2, 5] = poison
    got_RC = there_and_back(x_RC, dtype)
    others = np.arange(ROWS) != 2
    np.testing.assert_array_equal(got_RC[others], want_RC[others])
    assert np.isnan(got_RC[2]).all()


def test_types_that_need_a_scale_and_those_that_do_not():
    assert is_quantised(jnp.int8) and is_quantised("float8_e4m3fn")
    assert not is_quantised(jnp.bfloat16) and not is_quantised(np.float32)
    assert scale_bytes("int8") == 4 and scale_bytes("bfloat16") == 0
