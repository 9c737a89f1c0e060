"""Collectives and copies of a pool are read from a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine.hlo_facts import collectives, copies

POOL = frozenset({("bf16", 4000 * 2 * 64), ("bf16", 1000 * 2 * 64)})

LINES = """
  %all-reduce.5 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1
  %start = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%y), dimensions={0}
  %done = bf16[32]{0} all-gather-done(%start)
  ROOT %scatter.1 = bf16[4000,2,64]{2,1,0:T(8,128)(2,1)} scatter(%p, %i, %u), to_apply=%r
  %loop = (s32[], bf16[4000,2,64]{2,1,0}) while(%t), condition=%c, body=%b
  %prefetch = (bf16[4000,2,64]{2,1,0:S(1)}, bf16[4000,2,64]{2,1,0}, u32[]) copy-start(%p)
  %weights = bf16[4000,2,65]{2,1,0} copy(%w)
"""


def test_collectives_are_counted_once_each() -> None:
    assert collectives(LINES) == {"all-gather": 1, "all-reduce": 1}


def test_writes_in_place_loops_and_other_arrays_are_no_copies() -> None:
    assert copies(LINES, POOL) == {}


@pytest.mark.parametrize(
    "line,name",
    [
        ("%c = bf16[4000,2,64]{1,2,0} copy(%p)", "copy bf16[4000,2,64]"),
        ("ROOT %c = bf16[2,1000,64]{2,1,0} transpose(%p)", "transpose bf16[2,1000,64]"),
        ("%c = (bf16[1000,128]{1,0}, bf16[1000,128]{1,0}) copy-start(%p)", None),
    ],
)
def test_a_copy_of_the_pool_or_a_layer_is_named(line: str, name: str | None) -> None:
    assert copies(LINES + line, POOL) == {name or "copy-start bf16[1000,128]": 1}


def test_a_pool_that_is_not_donated_is_copied() -> None:
    """The text is that of a real compiler, and what it must do shows in it."""
    pool, row = jnp.zeros((64, 8, 128)), jnp.ones((8, 128))
    sizes = frozenset({("f32", pool.size)})

    def write(pool: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda i, pool: pool.at[i].set(row), pool)

    def text(**donate: int) -> str:
        return jax.jit(write, **donate).lower(pool, row).compile().as_text()

    assert copies(text(donate_argnums=0), sizes) == {}
    assert sum(copies(text(), sizes).values()) == 1
