"""Which kernels a deployment runs, and how its keys and values are stored: decided at start-up.

What has no kernel is refused here, with what has one and the way around, before any weight is read
and never in the middle of a request. Nothing falls back in silence: what was picked is printed.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels import backend as backends
from jaxserve.kernels import kv_write, paged_attention, sampling
from jaxserve.kernels.kv_pages import Pages, init_pages, init_row_pages, page_bytes
from jaxserve.models.config import ModelConfig

_FP8: Final = "float8_e4m3fn"
_FP8_CAPABILITY: Final = 8.9  # of CUDA, from Ada and Hopper on
_FP8_TPU: Final = 6  # the first TPU generation whose matrix unit takes it
_TPU_LANES: Final = 128


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """`attention` is a resolved backend of kernels/backend.py; `kv_dtype` is how pages store."""

    attention: str
    platform: str
    kv_dtype: str

    def names(self) -> dict[str, str]:
        """What runs each operation, for people and statistics."""
        chosen = {
            "paged_attention": self.attention,
            "kv_write": kv_write.implementation(self.attention),
            "sampling": sampling.implementation(self.attention),
        }
        return {operation: self._said(name) for operation, name in chosen.items()}

    def _said(self, name: str) -> str:
        interpreted = backends.is_interpreted(name, platform=self.platform)
        return f"{name} (interpreted)" if interpreted else name

    def __str__(self) -> str:
        chosen = ", ".join(f"{operation} {name}" for operation, name in self.names().items())
        return f"{chosen}; keys and values in {self.kv_dtype}"

    def bytes_per_token(self, model: ModelConfig, page_size: int) -> int:
        """Bytes that one token's keys, values and scales take in all layers, on all devices."""
        return model.num_layers * page_bytes(self._pages(model, 1, page_size)) // page_size

    def check_pool(
        self, model: ModelConfig, num_pages: int, page_size: int, *, num_devices: int
    ) -> None:
        """Raise ConfigError for a pool whose part on a device the kernels cannot address.

        Triton's lowering counts offsets in 32 signed bits up to 4 GiB (jax 0.10.2 to 0.12.0.1), of
        which numbers of one byte need one more.
        """
        if self.attention != backends.PALLAS_GPU or jnp.dtype(self.kv_dtype).itemsize > 1:
            return
        pages = self._pages(model, num_pages * model.num_layers, page_size)
        numbers = pages.kv_NKSD.size // num_devices
        if 2**31 <= numbers <= 2**32:
            raise ConfigError(
                f"num_pages: got {num_pages}, {numbers / 2**30:.2f} GiB of {self.kv_dtype} on a"
                " device; allowed: less than 2 GiB or more than 4, or --kernels=xla"
            )

    def _pages(self, model: ModelConfig, num_pages: int, page_size: int) -> Any:
        """The shapes of so many pages."""
        sizes: dict[str, Any] = {"page_size": page_size, "kernels": self.attention}
        sizes["kv_dtype"] = self.kv_dtype
        return jax.eval_shape(partial(init_layer, model, num_pages, **sizes))


def choose_kernels(
    config: EngineConfig, model: ModelConfig, *, dtype: str, device: Any
) -> KernelChoice:
    """The kernels for `model`, as it is spread over devices like `device`, in `dtype`.

    Raises ConfigError for kernels that do not run there, a KV type that the chip has not, and a
    head size, page size, type or vocabulary that the kernels have not.
    """
    platform = backends.platform_of(device)
    try:
        attention = backends.resolve(config.kernels, platform=platform)
    except ValueError as error:
        raise ConfigError(f"kernels: {error}") from error
    kv_dtype = dtype if config.cache.kv_dtype == "auto" else config.cache.kv_dtype
    if kv_dtype == _FP8 and not _has_fp8(device):
        raise ConfigError(
            f"kv_dtype: got {kv_dtype!r}; allowed on {device.device_kind}, which has no fp8:"
            " auto, float32, bfloat16, int8"
        )
    reason = paged_attention.unsupported(
        attention,
        head_dim=model.head_dim,
        page_size=config.cache.page_size,
        dtype=kv_dtype,
        group=model.group,
    ) or sampling.unsupported(attention, vocabulary=model.vocab_size)
    if reason is not None:
        raise ConfigError(f"{reason} (kernels {attention}); or --kernels=xla, which takes any")
    return KernelChoice(attention, platform, kv_dtype)


def _has_fp8(device: Any) -> bool:
    """Whether the chip computes with e4m3; a CPU does all types in software."""
    match backends.platform_of(device):
        case "gpu":
            return float(getattr(device, "compute_capability", _FP8_CAPABILITY)) >= _FP8_CAPABILITY
        case "tpu":
            generation = re.search(r"TPU ?v?(\d+)", device.device_kind)
            return generation is not None and int(generation[1]) >= _FP8_TPU
        case _:
            return True


def init_layer(
    model: ModelConfig, num_pages: int, *, page_size: int, kernels: str, kv_dtype: str
) -> Pages:
    """Empty pages as a resolved backend wants them; of all layers, if `num_pages` counts them."""
    sizes: dict[str, Any] = {
        "page_size": page_size,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": kv_dtype,
    }
    if not paged_attention.reads_rows(kernels):
        return init_pages(num_pages, **sizes)
    lanes = _TPU_LANES if kernels == backends.PALLAS_TPU else 1
    return init_row_pages(num_pages, lanes=lanes, **sizes)
