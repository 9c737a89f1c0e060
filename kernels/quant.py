"""Numbers of one byte with a float32 scale per row: how keys and values are stored small.

Knows rows of channels; knows no page. A row is one token's key, or value, of one kv head.

Dimension key: C channels per row; `...` stands for any leading axes

int8: scale = amax / 127, rounded to the nearest, ties to even. float8_e4m3fn: scale = amax / 448,
the largest finite number of the type, rounded by the type's own rule. So a row's largest entry
uses the whole range, and the error of an entry is at most half a step of 1 / 127 of amax for int8;
for fp8 at most 1 / 16 of the entry itself, or half the smallest step, 2 ** -10 / 448 of amax.

*Rows never mix.* A row of zeros has scale 1. A row that holds NaN or inf has a scale of NaN or inf
and is read back as NaN throughout: a fault stays where it happened, and stays visible there.

Everything here is elementwise but for one maximum, so kernels call it on what they hold.
"""

from typing import Final

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

LARGEST: Final[dict[str, float]] = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The quantised types, by the largest number that each of them is asked to hold."""


def is_quantised(dtype: DTypeLike) -> bool:
    """Whether numbers of this type are stored with a scale."""
    return jnp.dtype(dtype).name in LARGEST


def quantise(
    x: Float[Array, "*rows C"], dtype: DTypeLike
) -> tuple[Shaped[Array, "*rows C"], Float[Array, "*rows"]]:
    """Return the rows as `dtype` and their scales, float32. Raises KeyError for another dtype."""
    name = jnp.dtype(dtype).name
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST[name]
    # Below the least normal number a scale would be flushed to 0; such a row is stored as zeros.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, jnp.ones_like(scale), scale)
    # The division may round the largest entry up past the range, where fp8 has nothing but NaN.
    y = jnp.clip(x / jnp.expand_dims(scale, -1), -LARGEST[name], LARGEST[name])
    return (_nearest(y) if name == "int8" else y).astype(dtype), scale


def dequantise(
    stored: Shaped[Array, "*rows C"], scale: Float[Array, "*rows"]
) -> Float[Array, "*rows C"]:
    """Return what was stored, in float32 (in the scale's type, for numpy's float64)."""
    return stored.astype(scale.dtype) * scale[..., None]


def _nearest(y: Array) -> Array:
    """The nearest integers, ties to even. Triton lowers no such rounding (jax 0.10.2)."""
    whole = y.astype(jnp.int32)  # towards zero
    rest = jnp.abs(y - whole.astype(jnp.float32))
    away = (rest > 0.5) | ((rest == 0.5) & (whole % 2 != 0))
    return whole + jnp.where(away, jnp.where(y < 0, -1, 1), 0)


def scale_bytes(dtype: DTypeLike) -> int:
    """Bytes of scale beside each stored row: 4 or, for types without one, 0."""
    return jnp.dtype(jnp.float32).itemsize if is_quantised(dtype) else 0
