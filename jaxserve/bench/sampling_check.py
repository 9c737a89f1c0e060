"""What sampling is held to, whatever runs it: one row's kept weights, in float64, by a full sort.

Two ways of running it are held to each other, by the same weights where they part.

Dimension key: B rows  V vocabulary
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from jaxserve.kernels.sampling import RowParams

Filter = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p

_BOUNDARY: Final = 1e-5  # of a row's weight: so far float32 sums may be off


def row_params(filters: Sequence[Filter], **overrides: Any) -> RowParams:
    """Parameters of rows with these filters, seeded 0, 1, 2, ..., everything else being off."""
    B = len(filters)
    temperature, top_k, top_p, min_p = zip(*filters, strict=True)
    fields: dict[str, Any] = {
        "temperature_B": temperature,
        "top_k_B": top_k,
        "top_p_B": top_p,
        "min_p_B": min_p,
        "repetition_B": [1.0] * B,
        "presence_B": [0.0] * B,
        "frequency_B": [0.0] * B,
        "seed_B": range(B),
        "min_tokens_B": [0] * B,
        "ignore_eos_B": [False] * B,
        "stop_ids_BE": [[-1, -1]] * B,
    } | overrides
    dtypes = {"top_k_B": np.int32, "min_tokens_B": np.int32, "stop_ids_BE": np.int32} | {
        "seed_B": np.uint32,
        "ignore_eos_B": np.bool_,
    }
    return RowParams(
        **{k: jnp.asarray(np.asarray(v, dtypes.get(k, np.float32))) for k, v in fields.items()}
    )


def reference_weights(logits_V: np.ndarray, row: Filter) -> np.ndarray:
    """Kept weights of one row, by the words of the docstrings and a full sort."""
    temperature, top_k, top_p, min_p = row
    d_V = (logits_V.max() - logits_V) / np.float32(temperature)  # float32, as documented
    weight_V = np.where(d_V < 32, np.exp(-d_V.astype(np.float64)), 0.0)
    key_V = np.where(d_V < 32, np.floor(np.minimum(d_V, 32) * 2.0**24), 32 * 2.0**24)
    sorted_V = np.sort(key_V)
    keep_V = np.ones(len(key_V), bool)
    if top_k:
        keep_V &= key_V <= sorted_V[min(top_k, len(key_V)) - 1]
    if top_p < 1:
        order_V = np.argsort(key_V)
        mass_V = np.where(keep_V, weight_V, 0.0)
        before_V = np.cumsum(mass_V[order_V]) - mass_V[order_V]
        above_V = before_V[np.searchsorted(key_V[order_V], key_V)]  # ties: before their first
        keep_V &= above_V < np.float32(top_p) * mass_V.sum() * (1 - 1e-6)
    if min_p:
        keep_V &= d_V <= -np.log(np.float32(min_p))
    return np.where(keep_V, weight_V, 0.0)


def wrong_rows(
    logits_BV: Any,
    filters: Sequence[Filter],
    active_B: np.ndarray,
    u_B: Any,
    got: tuple[Any, Any],
    want: tuple[Any, Any],
) -> Iterator[str]:
    """What is wrong with rows of `got`, beside those of `want`; both as `sampling.sample` returns.

    Tokens are equal but for draws that rounding may hand to the next kept token: the uniform `u_B`
    lies on the boundary between the two, to five digits of the row's weight. Logits are read where
    tokens differ.
    """
    (token_B, finite_B), (want_B, want_finite_B) = (map(np.asarray, each) for each in (got, want))
    for b, row in enumerate(filters):
        said = f"row {b}: got token {token_B[b]}, wanted {want_B[b]}"
        if finite_B[b] != want_finite_B[b]:
            yield f"row {b}: logits are usable: got {finite_B[b]}, wanted {want_finite_B[b]}"
        elif not 0 <= token_B[b] < logits_BV.shape[1]:
            yield said
        elif want_finite_B[b] and token_B[b] != want_B[b]:
            between = sorted((int(token_B[b]), int(want_B[b])))
            if not active_B[b] or not _parts(np.asarray(logits_BV[b]), row, between, float(u_B[b])):
                yield said


def _parts(logits_V: np.ndarray, row: Filter, tokens: Sequence[int], u: float) -> bool:
    """Whether two tokens, the lower id first, are neighbours among the kept and `u` parts them."""
    temperature, top_k, *_ = row
    if temperature == 0 or top_k == 1:
        return False
    weight_V, (first, last) = reference_weights(logits_V, row), tokens
    neighbours = np.flatnonzero(weight_V[first : last + 1]).tolist() == [0, last - first]
    boundary = weight_V[: first + 1].sum() / weight_V.sum()
    return neighbours and bool(abs(boundary - u) < _BOUNDARY)
