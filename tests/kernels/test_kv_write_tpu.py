"""The TPU write against numpy assignment: interpreted, races detected. Compiling is tested beside
the attention kernel, in one loop with it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels.kv_pages import RowPages
from jaxserve.kernels.kv_write_tpu import write

N, K, D = 6, 2, 32


@partial(jax.jit, static_argnames="dma")
def jitted(pages, row_TKD, scale_TK2, page_T, slot_T, dma="on_wait"):
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma)
    return write(pages, row_TKD, scale_TK2, page_T, slot_T, interpret=interpret)


def check(dtype: str, S: int, tokens: list[tuple[int, int]], **options: str) -> None:
    """Write `tokens`, (page, slot) each; every bit of the pool must be as numpy would leave it."""
    rng = np.random.default_rng(0)
    T = len(tokens)
    page_T, slot_T = np.array(tokens, np.int32).reshape(T, 2).T
    narrow = dtype in ("int8", "float8_e4m3fn")

    def numbers(*shape):
        return jnp.asarray(rng.integers(-100, 100, shape)).astype(dtype)

    def scales(*shape):
        return jnp.asarray(rng.random(shape), jnp.float32) if narrow else None

    pages = RowPages(numbers(N, K, S, D), scales(N, K, 2 * S))
    row_TKD, scale_TK2 = numbers(T, K, D), scales(T, K, 2)
    want = [np.array(x) for x in pages if x is not None]
    for t, (page, slot) in enumerate(tokens):
        if 0 <= page < N:
            want[0][page, :, slot] = row_TKD[t]
            if scale_TK2 is not None:
                want[1][page][:, [slot, S + slot]] = scale_TK2[t]
    got = jitted(pages, row_TKD, scale_TK2, jnp.asarray(page_T), jnp.asarray(slot_T), **options)
    assert not interpret_pallas_call.races.races_found
    for x, y in zip(want, jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(np.asarray(y).view(np.uint8), x.view(np.uint8))


def prompt(pages: list[int], S: int, first: int, last: int) -> list[tuple[int, int]]:
    return [(pages[t // S], t % S) for t in range(first, last + 1)]


@pytest.mark.parametrize(
    "dtype, S", [("float32", 16), ("bfloat16", 32), ("int8", 64), ("float8_e4m3fn", 64)]
)
def test_prompts_decoding_rows_and_dropped_tokens(dtype, S):
    outside = [(-1, 0), (N, 1), (2**31 - 1, S - 1)]
    tokens = prompt([4, 1], S, S - 3, S + 9) + outside + [(0, 0), (5, S - 1)] + outside[:1]
    check(dtype, S, tokens)


def test_copies_may_finish_at_once():
    check("bfloat16", 32, [*prompt([4, 1], 32, 14, 50), (0, 3)], dma="eager")


def test_runs_longer_than_a_step_of_the_grid():
    check("float32", 128, prompt([3, 2], 128, 90, 160))


@pytest.mark.parametrize("tokens", [[(2, 7)], [(9, 7)], [(2, 7), (2, 8)]])
def test_one_or_two_tokens(tokens):
    check("bfloat16", 16, tokens)
