"""What a model is, as data: one frozen record that decoder, loaders and memory sums read.

Knows no arrays and no JAX. A family of models is a set of values here, not a second decoder.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Final

from jaxserve.errors import ConfigError

ROPE_SCALINGS: Final = ("none", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `scaling` and its numbers are those of Hugging Face's `rope_scaling`."""

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192

    def __post_init__(self) -> None:
        if self.scaling not in ROPE_SCALINGS:
            allowed = ", ".join(ROPE_SCALINGS)
            raise ConfigError(f"rope.scaling: got {self.scaling!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and variants of one decoder-only transformer.

    Heads share keys and values in groups of `num_heads / num_kv_heads`; head h reads kv head
    h // group. `qk_norm` normalises each head's queries and keys before they are rotated;
    `sliding_window` lets a token see so many of the newest ones only. `max_context` counts prompt
    and output tokens. A sample ends at any of `eos_token_ids`; `bos_token_id` starts every
    tokenised prompt when it is set.
    """

    name: str
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    max_context: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: got {getattr(self, field)}; allowed: 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads: got {self.num_heads}; allowed: a multiple of num_kv_heads"
                f" ({self.num_kv_heads})"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"sliding_window: got {self.sliding_window}; allowed: 1 or more, none"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: got {self.head_dim}; allowed: even numbers (rotary pairs)"
            )

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Weights in all, norms and biases included."""
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = self.width * heads + self.num_heads * self.head_dim * self.width
        layer += 3 * self.width * self.mlp_width + 2 * self.width
        layer += heads if self.qkv_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        embeddings = self.vocab_size * self.width * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.width

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token leaves in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def to_json(self) -> str:
        """The record as JSON; `from_json` is its inverse."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Raises ConfigError for text that is no such record."""
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["rope"] = RopeConfig(**fields["rope"])
            fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a jaxserve model configuration: {error}") from error


_LLAMA31_ROPE: Final = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0)

SHAPES: Final[dict[str, ModelConfig]] = {
    shape.name: shape
    for shape in (
        ModelConfig(
            name="tiny",
            num_layers=2,
            width=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_width=128,
            vocab_size=256,
            max_context=512,
        ),
        ModelConfig(
            name="llama-14m",
            num_layers=8,
            width=384,
            num_heads=6,
            num_kv_heads=2,
            head_dim=64,
            mlp_width=1024,
            vocab_size=4096,
            max_context=2048,
            tied_embeddings=True,
        ),
        ModelConfig(
            name="llama-160m",
            num_layers=12,
            width=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            mlp_width=3072,
            vocab_size=32_000,
            max_context=2048,
        ),
        ModelConfig(
            name="llama-1.1b",
            num_layers=22,
            width=2048,
            num_heads=32,
            num_kv_heads=4,
            head_dim=64,
            mlp_width=5632,
            vocab_size=32_000,
            max_context=2048,
        ),
        ModelConfig(
            name="llama2-13b",
            num_layers=40,
            width=5120,
            num_heads=40,
            num_kv_heads=40,
            head_dim=128,
            mlp_width=13_824,
            vocab_size=32_000,
            max_context=4096,
        ),
        ModelConfig(
            name="llama3-8b",
            num_layers=32,
            width=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_width=14_336,
            vocab_size=128_256,
            max_context=131_072,
            rope=_LLAMA31_ROPE,
        ),
        ModelConfig(
            name="llama3-70b",
            num_layers=80,
            width=8192,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            mlp_width=28_672,
            vocab_size=128_256,
            max_context=131_072,
            rope=_LLAMA31_ROPE,
        ),
    )
}
