"""From Hugging Face's tensors to the decoder's: names, transposes and fused projections.

Dimension key: D model width  F mlp width  K kv heads  G query heads per kv head  C channels
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from jaxserve.models.config import ModelConfig

Read = Callable[[str], np.ndarray]
"""read(name) -> the tensor of that Hugging Face name, projections as [out, in]."""

Path = tuple[str | int, ...]
"""Where a tensor stands in the decoder's nested dict."""


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, projections as [out, in], in the order HF stores them."""
    width, mlp = config.width, config.mlp_width
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, out_width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (out_width, width)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (out_width,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (width, q_width)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (mlp, width)
        shapes[f"{prefix}mlp.up_proj.weight"] = (mlp, width)
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, mlp)
        shapes[f"{prefix}input_layernorm.weight"] = (width,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def decoder_tensors(
    config: ModelConfig, read: Read
) -> Iterator[tuple[Path, Callable[[], np.ndarray]]]:
    """Path and maker of each of the decoder's tensors; dtypes are the source's.

    Nothing is read before a maker is called, so a loader holds only the tensors it is busy with.
    """
    yield ("embedding",), partial(read, "model.embed_tokens.weight")
    yield ("norm", "scale"), partial(read, "model.norm.weight")
    for number in range(config.num_layers):
        for path, make in _layer_tensors(config, read, f"model.layers.{number}."):
            yield ("layers", number, *path), make
    if not config.tied_embeddings:
        yield ("head", "kernel"), lambda: read("lm_head.weight").T


def _layer_tensors(
    config: ModelConfig, read: Read, prefix: str
) -> Iterator[tuple[Path, Callable[[], np.ndarray]]]:
    yield ("attention_norm", "scale"), partial(read, f"{prefix}input_layernorm.weight")
    kinds = {"kernel": "weight", "bias": "bias"} if config.qkv_bias else {"kernel": "weight"}
    for leaf, kind in kinds.items():
        yield ("attention", "qkv", leaf), partial(_fuse_qkv, config, read, prefix, kind)
    yield ("attention", "out", "kernel"), lambda: read(f"{prefix}self_attn.o_proj.weight").T
    if config.qk_norm:
        for name in ("q", "k"):
            scale = partial(read, f"{prefix}self_attn.{name}_norm.weight")
            yield ("attention", "qk_norm", f"{name}_scale"), scale
    yield ("mlp_norm", "scale"), partial(read, f"{prefix}post_attention_layernorm.weight")
    yield ("mlp", "gate_up", "kernel"), partial(_fuse_gate_up, read, prefix)
    yield ("mlp", "down", "kernel"), lambda: read(f"{prefix}mlp.down_proj.weight").T


def _fuse_qkv(config: ModelConfig, read: Read, prefix: str, kind: str) -> np.ndarray:
    """[D, K, G + 2, C]: per kv head its query heads, its key, its value."""
    parts = []
    for name, heads in (("q", config.group), ("k", 1), ("v", 1)):
        tensor = read(f"{prefix}self_attn.{name}_proj.{kind}").T
        parts.append(
            tensor.reshape(*tensor.shape[:-1], config.num_kv_heads, heads, config.head_dim)
        )
    return np.concatenate(parts, axis=-2)


def _fuse_gate_up(read: Read, prefix: str) -> np.ndarray:
    """[D, 2, F]."""
    return np.stack([read(f"{prefix}mlp.{name}_proj.weight").T for name in ("gate", "up")], axis=-2)
