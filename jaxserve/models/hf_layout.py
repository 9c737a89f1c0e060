"""From Hugging Face's tensors to the decoder's: names, transposes and fused projections.

Dimension key: D model width  F mlp width  K kv heads  G query heads per kv head  C channels
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxserve.models.config import ModelConfig

Read = Callable[[str], np.ndarray]
"""read(name) -> the tensor of that Hugging Face name, projections as [out, in]."""


def decoder_weights(config: ModelConfig, read: Read) -> dict[str, Any]:
    """The decoder's weights as a nested dict, one tensor at a time; dtypes are the source's."""
    weights: dict[str, Any] = {
        "embedding": read("model.embed_tokens.weight"),
        "norm": {"scale": read("model.norm.weight")},
        "layers": {i: _layer(config, read, i) for i in range(config.num_layers)},
    }
    if not config.tied_embeddings:
        weights["head"] = {"kernel": read("lm_head.weight").T}
    return weights


def _layer(config: ModelConfig, read: Read, number: int) -> dict[str, Any]:
    prefix = f"model.layers.{number}."
    attention: dict[str, Any] = {
        "qkv": {"kernel": _fuse_qkv(config, read, prefix, "weight")},
        "out": {"kernel": read(f"{prefix}self_attn.o_proj.weight").T},
    }
    if config.qkv_bias:
        attention["qkv"]["bias"] = _fuse_qkv(config, read, prefix, "bias")
    gate_up = [read(f"{prefix}mlp.{name}_proj.weight").T for name in ("gate", "up")]
    return {
        "attention_norm": {"scale": read(f"{prefix}input_layernorm.weight")},
        "attention": attention,
        "mlp_norm": {"scale": read(f"{prefix}post_attention_layernorm.weight")},
        "mlp": {
            "gate_up": {"kernel": np.stack(gate_up, axis=-2)},
            "down": {"kernel": read(f"{prefix}mlp.down_proj.weight").T},
        },
    }


def _fuse_qkv(config: ModelConfig, read: Read, prefix: str, kind: str) -> np.ndarray:
    """[D, K, G + 2, C]: per kv head its query heads, its key, its value."""
    parts = []
    for name, heads in (("q", config.group), ("k", 1), ("v", 1)):
        tensor = read(f"{prefix}self_attn.{name}_proj.{kind}").T
        parts.append(
            tensor.reshape(*tensor.shape[:-1], config.num_kv_heads, heads, config.head_dim)
        )
    return np.concatenate(parts, axis=-2)
