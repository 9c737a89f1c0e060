"""Random weights as files that every engine can load: safetensors and GGUF.

Knows file formats, no engine. `safetensors` and `gguf` are imported only where a file is written,
since jaxserve does not depend on them.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.config import SHAPES, ModelConfig
from jaxserve.models.random_weights import hf_state_dict

GGUF_NAME: Final = "model.gguf"


def write_hf(config: ModelConfig, weights: dict[str, np.ndarray], directory: Path) -> None:
    """Writes config.json and model.safetensors, which `transformers` loads as a Llama."""
    from safetensors.numpy import save_file  # pyright: ignore[reportMissingImports]

    directory.mkdir(parents=True, exist_ok=True)
    fields = hf_fields(config, dtype="float32")
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def hf_fields(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The config.json of a plain Llama stored in `dtype`. Raises ConfigError for other shapes."""
    _require_plain_llama(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


_GGUF_NAMES: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_OUTER_NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_tensor(name: str, weight: np.ndarray, *, config: ModelConfig) -> tuple[str, np.ndarray]:
    """GGUF's name and layout of a Hugging Face tensor.

    llama.cpp rotates neighbouring channels (0, 1), (2, 3), ... where Hugging Face rotates channel i
    with i + C/2, so the rows of q and k are interleaved within each head.
    """
    if name in _GGUF_OUTER_NAMES:
        return _GGUF_OUTER_NAMES[name], weight
    _, _, layer, inner = name.split(".", 3)
    stem = inner.removesuffix(".weight")
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    if stem in heads:
        halves = weight.reshape(heads[stem], 2, config.head_dim // 2, config.width)
        weight = halves.swapaxes(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{_GGUF_NAMES[stem]}.weight", np.ascontiguousarray(weight)


def write_gguf(config: ModelConfig, weights: dict[str, np.ndarray], path: Path) -> None:
    """Writes the weights in float32 for llama.cpp's `llama` architecture, without a tokenizer."""
    from gguf import GGUFWriter, LlamaFileType  # pyright: ignore[reportMissingImports]

    _require_plain_llama(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_name(config.name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("none")
    for name, weight in weights.items():
        writer.add_tensor(*gguf_tensor(name, weight, config=config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _require_plain_llama(config: ModelConfig) -> None:
    if config.rope.scaling != "none" or config.qkv_bias or config.qk_norm or config.sliding_window:
        raise ConfigError(
            f"{config.name}: got rope scaling {config.rope.scaling!r}, qkv_bias"
            f" {config.qkv_bias}, qk_norm {config.qk_norm} and sliding_window"
            f" {config.sliding_window}; the peers' files are written for plain Llama shapes only,"
            " such as llama-14m"
        )


def main() -> None:
    """Writes one random model for all peers."""
    parser = argparse.ArgumentParser(description="write a random model as safetensors and GGUF")
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = SHAPES[options.shape]
    weights = hf_state_dict(config, options.seed)
    write_hf(config, weights, options.out)
    write_gguf(config, weights, options.out / GGUF_NAME)


if __name__ == "__main__":
    main()
