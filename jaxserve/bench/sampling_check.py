"""What sampling is held to, whatever runs it: one row's kept weights, in float64, by a full sort.

Dimension key: B rows  V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.kernels.sampling import RowParams

Filter = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p


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
        mass_V = np.where(keep_V, weight_V, 0.0)
        above_V = np.array([mass_V[key_V < key].sum() for key in key_V])
        keep_V &= above_V < np.float32(top_p) * mass_V.sum() * (1 - 1e-6)
    if min_p:
        keep_V &= d_V <= -np.log(np.float32(min_p))
    return np.where(keep_V, weight_V, 0.0)
