"""From Hugging Face's tensors to the decoder's: names, transposes and fused projections.

It is a plan and moves nothing itself (assemble.py does): which rows of which Hugging Face tensor go
where in a tensor of the decoder.

Dimension key: D model width  F mlp width  K kv heads  G query heads per kv head  C channels
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from jaxserve.models.config import ModelConfig

# Rows moved at once. A transposed copy of them writes whole cache lines, and reads what still lies
# in the second-level cache: 128 take a tenth less time than 64, 32 half as much again.
BAND_ROWS: Final = 128

EMBEDDING: Final = "model.embed_tokens.weight"

Path = tuple[str | int, ...]
"""Where a tensor stands in the decoder's nested dict."""

ReadRows = Callable[[int, int], np.ndarray]
"""read(start, stop) -> those rows of one Hugging Face tensor, projections as [out, in]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of the Hugging Face tensor `name`, and their place in the decoder's.

    `into` has an index or a slice for each axis of the decoder's tensor. What it selects is the
    rows as they are, or, `transposed`, with the rows last.
    """

    name: str
    start: int
    stop: int
    into: tuple[int | slice, ...]
    transposed: bool = False


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, projections as [out, in], in the order HF stores them."""
    width, mlp = config.width, config.mlp_width
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width)}
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


def decoder_tensors(config: ModelConfig) -> Iterator[tuple[Path, list[Piece]]]:
    """Path of each of the decoder's tensors, and the pieces that make it up, each value once."""
    yield ("embedding",), _plain(EMBEDDING, (config.vocab_size, config.width))
    yield ("norm", "scale"), _plain("model.norm.weight", (config.width,))
    for number in range(config.num_layers):
        for path, pieces in _layer_tensors(config, f"model.layers.{number}."):
            yield ("layers", number, *path), pieces
    if not config.tied_embeddings:
        yield ("head", "kernel"), _transposed("lm_head.weight", config.vocab_size)


def _layer_tensors(config: ModelConfig, prefix: str) -> Iterator[tuple[Path, list[Piece]]]:
    width = (config.width,)
    yield ("attention_norm", "scale"), _plain(f"{prefix}input_layernorm.weight", width)
    yield ("attention", "qkv", "kernel"), list(_qkv(config, prefix, "weight"))
    if config.qkv_bias:
        yield ("attention", "qkv", "bias"), list(_qkv(config, prefix, "bias"))
    out = _transposed(f"{prefix}self_attn.o_proj.weight", config.width)
    yield ("attention", "out", "kernel"), out
    if config.qk_norm:
        for name in ("q", "k"):
            scale = _plain(f"{prefix}self_attn.{name}_norm.weight", (config.head_dim,))
            yield ("attention", "qk_norm", f"{name}_scale"), scale
    yield ("mlp_norm", "scale"), _plain(f"{prefix}post_attention_layernorm.weight", width)
    gate_up = [
        piece
        for number, name in enumerate(("gate", "up"))
        for piece in _transposed(f"{prefix}mlp.{name}_proj.weight", config.mlp_width, number)
    ]
    yield ("mlp", "gate_up", "kernel"), gate_up
    yield ("mlp", "down", "kernel"), _transposed(f"{prefix}mlp.down_proj.weight", config.width)


def _plain(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """A tensor that is the same in both."""
    rest = (slice(None),) * (len(shape) - 1)
    return [
        Piece(name, start, stop, (slice(start, stop), *rest)) for start, stop in _bands(shape[0])
    ]


def _transposed(name: str, num_rows: int, *middle: int) -> list[Piece]:
    """A projection of `num_rows` outputs, as [D, outputs], or at `middle` of [D, 2, outputs]."""
    return [
        Piece(name, start, stop, (slice(None), *middle, slice(start, stop)), transposed=True)
        for start, stop in _bands(num_rows)
    ]


def _qkv(config: ModelConfig, prefix: str, kind: str) -> Iterator[Piece]:
    """[D, K, G + 2, C], a bias without D: per kv head its query heads, its key, its value."""
    group, head_dim = config.group, config.head_dim
    width = (slice(None),) if kind == "weight" else ()
    for letter, heads, first in (("q", group, 0), ("k", 1, group), ("v", 1, group + 1)):
        for kv_head in range(config.num_kv_heads):
            for head in range(heads):
                start = (kv_head * heads + head) * head_dim
                yield Piece(
                    f"{prefix}self_attn.{letter}_proj.{kind}",
                    start,
                    start + head_dim,
                    (*width, kv_head, first + head, slice(None)),
                    transposed=kind == "weight",
                )


def _bands(num_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, BAND_ROWS):
        yield start, min(start + BAND_ROWS, num_rows)
