"""Random weights by Hugging Face names: the same numbers in every engine that can load them.

Each tensor is drawn from its own generator, seeded by its name, so that a loader may draw them in
any order, or only some of them. numpy only.
"""

import numpy as np

from jaxserve.models.config import ModelConfig

INIT_STD = 0.02


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
        shapes[f"{prefix}mlp.gate_proj.weight"] = (mlp, width)
        shapes[f"{prefix}mlp.up_proj.weight"] = (mlp, width)
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, mlp)
        shapes[f"{prefix}input_layernorm.weight"] = (width,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def hf_tensor(name: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """One tensor in float32: ones for norms, zeros for biases, N(0, 0.02) for the rest."""
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng([seed, *name.encode()])
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(INIT_STD)


def hf_state_dict(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """All weights of a random model, float32, by their Hugging Face names."""
    return {name: hf_tensor(name, shape, seed=seed) for name, shape in hf_shapes(config).items()}
