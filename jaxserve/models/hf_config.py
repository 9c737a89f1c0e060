"""Hugging Face's config.json as a `ModelConfig`. Knows names of fields and families, no tensors.

A family is a row of FAMILIES: the decoder's variants that its architecture name implies. Fields
that would change what is computed and that the decoder does not have are refused by name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig, RopeConfig

CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's name says. `window` reads the sliding window of all layers."""

    qkv_bias: bool = False
    qk_norm: bool = False
    window: Callable[[Fields], int | None] = lambda fields: None


def _mistral_window(fields: Fields) -> int | None:
    return fields.get("sliding_window")


def _qwen_window(fields: Fields) -> int | None:
    """Qwen's layers from `max_window_layers` on have a window, if `use_sliding_window` says so."""
    if not fields.get("use_sliding_window", False):
        return None
    if fields.get("max_window_layers", 0) >= fields["num_hidden_layers"]:
        return None
    if fields.get("max_window_layers", 0) == 0:
        return fields.get("sliding_window")
    raise _refused("max_window_layers", fields["max_window_layers"], "0, or all layers")


FAMILIES: Final[dict[str, Family]] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window=_mistral_window),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window=_qwen_window),
    "Qwen3ForCausalLM": Family(qk_norm=True, window=_qwen_window),
}

# Fields that change the computation, with the values under which the decoder computes the same.
_ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}


def _refused(field: str, got: object, allowed: str) -> ConfigError:
    return ConfigError(f"{field}: got {got!r}; allowed: {allowed}")


def read_hf_config(directory: Path) -> ModelConfig:
    """The model's shape. Raises ConfigError naming file, field, got and allowed."""
    path = directory / CONFIG_FILE
    fields = read_json(path)
    try:
        config = _model_config(fields, name=directory.resolve().name)
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]}: missing") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def read_generation_fields(directory: Path) -> dict[str, Any]:
    """The fields of generation_config.json; none when there is no such file."""
    path = directory / GENERATION_FILE
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError for a file that cannot be read or holds something else."""
    try:
        fields = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: damaged: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: got {type(fields).__name__}; wanted an object")
    return fields


def _model_config(fields: Fields, *, name: str) -> ModelConfig:
    family = _family(fields)
    for field, allowed in _ONLY.items():
        if field in fields and fields[field] not in allowed:
            raise _refused(field, fields[field], " or ".join(map(repr, allowed)))
    window = family.window(fields)
    types = set(fields.get("layer_types") or ())
    uniform = "full_attention" if window is None else "sliding_attention"
    if types - {uniform}:
        raise _refused("layer_types", sorted(types), f"{uniform!r} in all layers")
    width, num_heads = fields["hidden_size"], fields["num_attention_heads"]
    return ModelConfig(
        name=name,
        num_layers=fields["num_hidden_layers"],
        width=width,
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=fields.get("head_dim") or width // num_heads,
        mlp_width=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        max_context=fields["max_position_embeddings"],
        rope=_rope(fields),
        norm_eps=fields["rms_norm_eps"],
        tied_embeddings=fields.get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        eos_token_ids=token_ids(fields.get("eos_token_id")),
        bos_token_id=fields.get("bos_token_id"),
    )


def _family(fields: Fields) -> Family:
    names = fields.get("architectures") or ["none"]
    if len(names) != 1 or names[0] not in FAMILIES:
        raise _refused("architectures", names, "one of " + ", ".join(FAMILIES))
    return FAMILIES[names[0]]


def _rope(fields: Fields) -> RopeConfig:
    """Both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters` (transformers 5)."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    match kind:
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(theta=theta, scaling="linear", factor=rope["factor"])
        case "llama3":
            return RopeConfig(
                theta=theta,
                scaling="llama3",
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_max_context=rope["original_max_position_embeddings"],
            )
    raise _refused("rope_type", kind, "default, linear or llama3")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Hugging Face writes one id, several, or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
