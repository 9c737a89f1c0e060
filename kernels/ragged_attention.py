"""Attention of a mixed step: prompt tiles of several rows beside one new token of other rows.

Knows one layer's pages and the batch of one step; knows no request, slice or scheduler.

Dimension key: X = N * Q + B queries  N prompt tiles  Q queries per tile  B rows  H query heads
C channels per head  P pages per row
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .kv_pages import Pages
from .paged_attention import paged_attention


class Tiles(NamedTuple):
    """Prompt tiles: whose they are, the position of their first token, and how many are real."""

    row_N: Int[Array, " N"]
    start_N: Int[Array, " N"]
    valid_N: Int[Array, " N"]


def ragged_attention(
    q_XHC: Float[Array, "X H C"],
    pages: Pages,
    table_BP: Int[Array, "B P"],
    tiles: Tiles,
    length_B: Int[Array, " B"],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    first_page: Int[Array, ""] | int = 0,
    backend: str = "auto",
) -> Float[Array, "X H C"]:
    """Attend from N tiles of Q prompt tokens, then one token of each of B rows; returns out_XHC.

    Tile n holds the queries at positions start..start+valid-1 of row `row_N[n]`, whose keys up to
    there are in its pages, a cached prefix and earlier chunks included; each query sees those up to
    its own position. Row b has `length_B[b]` keys, its token's own the last of them; rows of length
    0 take no part. What is returned for padding and for such rows is finite and means nothing. The
    options, and what is raised, are those of `paged_attention`.

    *Two launches, on every backend.* A tile's work is matrix products of G * Q rows against keys
    read once for all of them, and is bound by arithmetic; a row's is a stream of keys for G rows,
    bound by memory, and split over pages. One kernel for both would run one of them with the
    other's blocks and registers; what one launch saves is microseconds, and neither waits for the
    other's rows, because both already balance their own. Decode alone (no tiles) is one launch.
    """
    B, N = table_BP.shape[0], tiles.row_N.shape[0]
    num_prompt = q_XHC.shape[0] - B
    options: dict[str, Any] = {"window": window, "soft_cap": soft_cap, "scale": scale}
    options |= {"first_page": first_page, "backend": backend}
    out_B1HC = paged_attention(
        q_XHC[num_prompt:, None], pages, table_BP, length_B, length_B - 1, **options
    )
    if not N:
        return out_B1HC[:, 0]
    out_NQHC = paged_attention(
        q_XHC[:num_prompt].reshape(N, -1, *q_XHC.shape[1:]),
        pages,
        table_BP[tiles.row_N],
        tiles.start_N + tiles.valid_N,
        tiles.start_N,
        **options,
    )
    return jnp.concatenate([out_NQHC.reshape(num_prompt, *q_XHC.shape[1:]), out_B1HC[:, 0]])
