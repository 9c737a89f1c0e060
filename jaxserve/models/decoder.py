"""The one decoder: a Llama-family transformer whose variants are values of `ModelConfig`.

It knows nothing of pages, rows or slices: attention is a callable that the caller passes in, with a
memory of keys and values that is handed through. Training, the mixed step and the decode loop share
this code.

The layers run unrolled, or in a loop that picks each layer's weights by `lax.switch`. The loop
traces and compiles attention once instead of once per layer: on a CPU, where each attention is a
native kernel to compile, a slice program of 8 layers compiles in a quarter of the time and runs as
fast (measured, jax 0.10.2). Weights stacked for `lax.scan` would be copied at every layer there.

*Tensor parallelism.* Inside `jax.shard_map` each device runs this decoder on its share: `config` is
then the share's (partition.py), and `axis` names the mesh axis over which partial sums are added
and logits gathered.

Dimension key: D model width  F mlp width  H query heads  K kv heads  G = H / K  C channels per head
V vocabulary; `...` stands for any leading axes (tokens, or batch and tokens).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.models.config import ModelConfig, RopeConfig

Attend = Callable[[Any, Array, Array, Array, Any], tuple[Array, Any]]
"""attend(layer, q_...HC, k_...KC, v_...KC, memory) -> (out_...HC, memory). `layer` is an int, or a
traced int32 when the layers run in a loop; `memory` is a pytree of the caller's."""


class Projection(nnx.Module):
    """A linear map from the last axis to `out_shape`; the weight is [D, *out_shape], or that flat.

    The door for other weights: a quantised projection is another leaf with the same call.
    """

    def __init__(self, width_in: int, out_shape: tuple[int, ...], *, bias: bool, init: "Init"):
        self.kernel = nnx.Param(init((width_in, *out_shape)))
        self.bias = nnx.Param(jnp.zeros(out_shape, init.dtype)) if bias else None
        self.out_shape = out_shape

    def __call__(self, x: Float[Array, "... D"]) -> Array:
        # One matrix product whatever the output's shape; flattening a whole array costs nothing.
        y = x @ self.kernel[...].reshape(x.shape[-1], -1)
        if self.bias is not None:
            y = y + _along_last(self.bias[...].reshape(-1), y)
        return y.reshape(*x.shape[:-1], *self.out_shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, *, eps: float, init: "Init"):
        self.scale = nnx.Param(jnp.ones((width,), init.dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _normalise(x, self.eps) * _along_last(self.scale[...], x)


class QkNorm(nnx.Module):
    """The RMS norm of each head's queries, and another of its keys (Qwen 3; Henry et al. 2020)."""

    def __init__(self, config: ModelConfig, *, init: "Init"):
        self.q_scale = nnx.Param(jnp.ones((config.head_dim,), init.dtype))
        self.k_scale = nnx.Param(jnp.ones((config.head_dim,), init.dtype))
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "... K G1 C"]) -> Float[Array, "... K G1 C"]:
        """`x` holds, per kv head, its G query heads and then its key."""
        group = x.shape[-2] - 1
        scale = jnp.stack([self.q_scale[...]] * group + [self.k_scale[...]])
        return _normalise(x, self.eps) * scale.reshape((1,) * (x.ndim - 2) + scale.shape)


class Attention(nnx.Module):
    """Grouped-query attention. One projection makes q, k and v, laid out per kv head.

    The fused output is [K, G + 2, C]: G query heads, then their key, then their value, so that
    sharding the K axis keeps a group together.
    """

    def __init__(self, config: ModelConfig, *, init: "Init"):
        kv_heads, group, head_dim = config.num_kv_heads, config.group, config.head_dim
        self.qkv = Projection(
            config.width, (kv_heads, group + 2, head_dim), bias=config.qkv_bias, init=init
        )
        self.out = Projection(config.num_heads * head_dim, (config.width,), bias=False, init=init)
        self.qk_norm = QkNorm(config, init=init) if config.qk_norm else None
        self.group = group

    def project(
        self, x: Float[Array, "... D"], rotation: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Rotated queries [..., H, C] and keys [..., K, C], and values [..., K, C]."""
        qkv = self.qkv(x)
        qk = qkv[..., : self.group + 1, :]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        rotated = rotate(qk, rotation)
        q, k = rotated[..., : self.group, :], rotated[..., self.group, :]
        return q.reshape(*x.shape[:-1], -1, q.shape[-1]), k, qkv[..., self.group + 1, :]


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020); gate and up are one projection [D, 2, F]."""

    def __init__(self, config: ModelConfig, *, init: "Init"):
        self.gate_up = Projection(config.width, (2, config.mlp_width), bias=False, init=init)
        self.down = Projection(config.mlp_width, (config.width,), bias=False, init=init)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate_up = self.gate_up(x)
        return self.down(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :])


class Layer(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, *, init: "Init", axis: str | None):
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps, init=init)
        self.attention = Attention(config, init=init)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps, init=init)
        self.mlp = Mlp(config, init=init)
        self.axis = axis

    def before_attention(
        self, x: Float[Array, "... D"], rotation: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        return self.attention.project(self.attention_norm(x), rotation)

    def after_attention(
        self, x: Float[Array, "... D"], attended: Float[Array, "... H C"]
    ) -> Float[Array, "... D"]:
        x = x + _sum_over(self.axis, self.attention.out(attended.reshape(*x.shape[:-1], -1)))
        return x + _sum_over(self.axis, self.mlp(self.mlp_norm(x)))


class Init:
    """Makes weights when the decoder is built: random ones to train, or shapes to be filled."""

    def __init__(self, dtype: DTypeLike, rngs: nnx.Rngs | None = None, *, scale: float = 0.02):
        self.dtype, self._rngs, self._scale = dtype, rngs, scale

    def __call__(self, shape: tuple[int, ...]) -> Array:
        if self._rngs is None:
            return jnp.zeros(shape, self.dtype)
        return self._scale * jax.random.normal(self._rngs.params(), shape, self.dtype)


class Decoder(nnx.Module):
    """Tokens to hidden states to logits.

    Source: Touvron et al. 2023 (Llama), with the variants of `ModelConfig`; Shoeybi et al. 2019
    (Megatron-LM) for its parallel form.
    """

    def __init__(self, config: ModelConfig, *, init: Init, axis: str | None = None):
        self.embedding = nnx.Param(init((config.vocab_size, config.width)))
        self.layers = nnx.List(
            [Layer(config, init=init, axis=axis) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps, init=init)
        self.head = (
            None
            if config.tied_embeddings
            else Projection(config.width, (config.vocab_size,), bias=False, init=init)
        )
        self.config = config
        self.axis = axis

    def __call__(
        self,
        tokens: Int[Array, "..."],
        positions: Int[Array, "..."],
        attend: Attend,
        memory: Any,
        *,
        loop: bool = False,
    ) -> tuple[Float[Array, "... D"], Any]:
        """Hidden states after the last norm, and the memory as attention left it.

        `positions` are absolute, in tokens. `loop` runs the layers in a loop.
        """
        rotation = rope_rotation(positions, self.config.head_dim, self.config.rope)
        x = self._embed(tokens)
        run = _run_looped if loop else _run_unrolled
        x, memory = run(list(self.layers), x, rotation, attend, memory)
        return self.norm(x), memory

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32, of the whole vocabulary on every device."""
        out = x @ self.embedding[...].T if self.head is None else self.head(x)
        if self.axis is not None:
            out = lax.all_gather(out, self.axis, axis=out.ndim - 1, tiled=True)
        return out.astype(jnp.float32)

    def _embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        if self.axis is None:
            return self.embedding[...][tokens]
        # Each device holds a range of the vocabulary, and adds nothing for the other tokens.
        local = tokens - lax.axis_index(self.axis) * self.config.vocab_size
        mine = (local >= 0) & (local < self.config.vocab_size)
        x = self.embedding[...].at[local].get(mode="clip")
        return lax.psum(jnp.where(mine[..., None], x, 0), self.axis)


def _run_unrolled(
    layers: Sequence[Layer], x: Array, rotation: tuple[Array, Array], attend: Attend, memory: Any
) -> tuple[Array, Any]:
    for number, layer in enumerate(layers):
        graphdef, weights = nnx.split(layer)
        q, k, v = _before_attention(graphdef, weights, rotation, x)
        attended, memory = attend(number, q, k, v, memory)
        x = _after_attention(graphdef, weights, x, attended)
    return x, memory


def _run_looped(
    layers: Sequence[Layer], x: Array, rotation: tuple[Array, Array], attend: Attend, memory: Any
) -> tuple[Array, Any]:
    parts = [nnx.split(layer) for layer in layers]
    before = [partial(_before_attention, *part, rotation) for part in parts]
    after = [partial(_after_attention, *part) for part in parts]

    def one(number: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        x, memory = carry
        attended, memory = attend(number, *lax.switch(number, before, x), memory)
        return lax.switch(number, after, x, attended), memory

    return lax.fori_loop(0, len(layers), one, (x, memory))


# Jitted with the weights as arguments, so that all layers share one trace: tracing is most of what
# a start with a warm compilation cache takes.


@partial(jax.jit, static_argnums=0)
def _before_attention(graphdef: Any, weights: Any, rotation: tuple[Array, Array], x: Array) -> Any:
    return nnx.merge(graphdef, weights).before_attention(x, rotation)


@partial(jax.jit, static_argnums=0)
def _after_attention(graphdef: Any, weights: Any, x: Array, attended: Array) -> Array:
    return nnx.merge(graphdef, weights).after_attention(x, attended)


def _normalise(x: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype)


def _sum_over(axis: str | None, x: Array) -> Array:
    return x if axis is None else lax.psum(x, axis)


def rope_frequencies(head_dim: int, rope: RopeConfig) -> np.ndarray:
    """Angular frequency of each rotary pair, float64 [C / 2].

    `llama3` stretches long wavelengths by `factor`, keeps short ones and blends between
    (Hugging Face transformers, `_compute_llama3_parameters`).
    """
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_max_context * frequencies / (2 * np.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return frequencies * (blend + (1 - blend) / rope.factor)
    return frequencies


def rope_rotation(
    positions: Int[Array, "..."], head_dim: int, rope: RopeConfig
) -> tuple[Float[Array, "... C2"], Float[Array, "... C2"]]:
    """Cosine and sine of each position's angles, float32."""
    frequencies = jnp.asarray(rope_frequencies(head_dim, rope), jnp.float32)
    position_1 = positions[..., None].astype(jnp.float32)
    angles = position_1 * _along_last(frequencies, position_1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotate pairs (c, c + C/2) of x [..., K, heads, C] by each token's angles [..., C/2]."""
    cos, sin = (part[..., None, None, :].astype(x.dtype) for part in rotation)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _along_last(x_D: Array, like: Array) -> Array:
    """Give a vector the rank of `like`, along its last axis."""
    return x_D.reshape((1,) * (like.ndim - 1) + (-1,))


def causal_attention(config: ModelConfig) -> Attend:
    """Attention without memory, as the model has it: q [B, T, H, C], k and v [B, T, K, C]."""
    window = config.sliding_window
    newest = None if window is None else (window - 1, 0)

    def attend(layer: Any, q: Array, k: Array, v: Array, memory: None) -> tuple[Array, None]:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=newest)
        return out, memory

    return attend
