"""Slice times computed from data sheets: for each step the larger of memory and compute time.

What is counted: every weight once per step, head and embedding rows included; keys and values read
and written; logits; the products of all linear layers for every row and prompt token of the
bucket, padding included; attention; the sums over devices of tensor parallelism. What is not:
activations that stay on the chip, imperfect overlap of the two sides, anything that depends on the
kernels. The efficiencies stand for all that, and are assumptions until something was measured.
"""

from dataclasses import dataclass
from typing import Final

from .serving_time import SliceShape
from .slice_time import HostTime

TILE_QUERIES: Final = 32
"""Prompt tokens that share one reading of the keys and values before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A decoder's sizes. `value_bytes` is the size of a weight; `kv_value_bytes` that of a cached
    key's channel (None: the same), with `kv_scale_bytes` of scale beside each key and each value.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    tied_embeddings: bool
    value_bytes: int
    kv_value_bytes: int | None = None
    kv_scale_bytes: int = 0

    @property
    def linear_weights(self) -> int:
        """Weights of the layers' matrix products."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.num_layers * self.width * (heads + 3 * self.mlp_width)

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.width

    @property
    def weight_bytes(self) -> int:
        """All matrices in memory; norms and biases are too few to count."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        return (self.linear_weights + embeddings) * self.value_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        value_bytes = self.value_bytes if self.kv_value_bytes is None else self.kv_value_bytes
        row_bytes = self.head_dim * value_bytes + self.kv_scale_bytes
        return 2 * self.num_layers * self.num_kv_heads * row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A data sheet's numbers, per device: bytes of memory, bytes per second of memory, dense
    products and sums per second in 16 bits, bytes per second to the others in one direction."""

    kind: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    link_bytes_per_s: float
    source: str


DEVICES: Final[dict[str, Device]] = {
    "h200": Device(
        kind="NVIDIA H200",
        memory_bytes=141e9,
        memory_bytes_per_s=4.8e12,
        flops=989e12,
        link_bytes_per_s=450e9,
        source="NVIDIA H200 data sheet, SXM: 141 GB, 4.8 TB/s, 1,979 TFLOPS bf16 with sparsity"
        " (half of it dense), NVLink 900 GB/s in both directions together",
    ),
    "h100": Device(
        kind="NVIDIA H100 80GB HBM3",
        memory_bytes=80e9,
        memory_bytes_per_s=3.35e12,
        flops=989e12,
        link_bytes_per_s=450e9,
        source="NVIDIA H100 data sheet, SXM: 80 GB, 3.35 TB/s, 1,979 TFLOPS bf16 with sparsity"
        " (half of it dense), NVLink 900 GB/s in both directions together",
    ),
    "a100": Device(
        kind="NVIDIA A100-SXM4-80GB",
        memory_bytes=80e9,
        memory_bytes_per_s=2.039e12,
        flops=312e12,
        link_bytes_per_s=300e9,
        source="NVIDIA A100 80GB data sheet, SXM: 2,039 GB/s, 312 TFLOPS bf16 and fp16 dense,"
        " NVLink 600 GB/s in both directions together",
    ),
    "v5e": Device(
        kind="TPU v5e",
        memory_bytes=16e9,
        memory_bytes_per_s=819e9,
        flops=197e12,
        link_bytes_per_s=200e9,
        source="cloud.google.com/tpu/docs/v5e: 16 GB, 819 GB/s, 197 TFLOPs bf16, ICI 400 GB/s in"
        " both directions together",
    ),
    "v5p": Device(
        kind="TPU v5p",
        memory_bytes=95e9,
        memory_bytes_per_s=2765e9,
        flops=459e12,
        link_bytes_per_s=600e9,
        source="cloud.google.com/tpu/docs/v5p: 95 GB, 2,765 GB/s, 459 TFLOPs bf16, ICI 1,200 GB/s"
        " in both directions together",
    ),
    "v6e": Device(
        kind="TPU v6e",
        memory_bytes=32e9,
        memory_bytes_per_s=1640e9,
        flops=918e12,
        link_bytes_per_s=400e9,
        source="cloud.google.com/tpu/docs/v6e: 32 GB, 1,640 GB/s (1,600 in later versions of the"
        " page), 918 TFLOPs bf16, ICI 800 GB/s in both directions together",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What no data sheet says. Shares of the peak that are reached, and fixed seconds: of a
    dispatch, of a step (launches, the loop's condition) and of a sum over devices."""

    memory_share: float = 0.85
    compute_share: float = 0.6
    link_share: float = 0.7
    dispatch_s: float = 100e-6
    step_s: float = 30e-6
    sum_s: float = 8e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineTime:
    """A slice on `num_devices` devices that share the model by tensor parallelism.

    Keys and values are held more than once where there are more devices than kv heads.
    """

    sizes: ModelSizes
    device: Device
    num_devices: int = 1
    assumed: Assumptions = Assumptions()
    host: HostTime = HostTime()

    def slice_s(self, shape: SliceShape) -> float:
        """Seconds; the contexts are spread evenly over the steps."""
        attended = shape.attended_tokens / max(1, shape.steps)
        decode_steps, seconds = shape.steps, self.assumed.dispatch_s
        if shape.prefill_tokens:
            decode_steps -= 1
            seconds += self.step_s(
                shape.rows, attended, shape.prefill_tokens, shape.prefill_attended_tokens
            )
        return seconds + decode_steps * self.step_s(shape.rows, attended)

    def host_s(self, shape: SliceShape) -> float:
        return self.host.seconds(shape)

    def step_s(
        self,
        rows: int,
        attended_tokens: float,
        prefill_tokens: int = 0,
        prefill_attended_tokens: int = 0,
    ) -> float:
        """Seconds of one model step over `rows` rows and so many prompt tokens beside them."""
        tokens, assumed = rows + prefill_tokens, self.assumed
        memory_s = self.step_bytes(rows, tokens, attended_tokens, prefill_attended_tokens) / (
            self.device.memory_bytes_per_s * assumed.memory_share
        )
        compute_s = self.step_flops(rows, tokens, attended_tokens + prefill_attended_tokens) / (
            self.device.flops * assumed.compute_share
        )
        return max(memory_s, compute_s) + self._sums_s(rows, tokens) + assumed.step_s

    def step_bytes(
        self, rows: int, tokens: int, attended: float, prefill_attended: int = 0
    ) -> float:
        """Read and written on one device by a step of `tokens` tokens, those of `rows` rows among
        them, which attend to `attended` others in all."""
        sizes = self.sizes
        weights = (sizes.linear_weights + sizes.head_weights) / self.num_devices
        weights += tokens * sizes.width  # rows of the embedding
        kv_share = max(1 / self.num_devices, 1 / sizes.num_kv_heads)
        kv_tokens = attended + prefill_attended / TILE_QUERIES + tokens
        logits = 2 * 4 * rows * sizes.vocab_size  # float32, written and read, whole on each device
        kv = kv_tokens * sizes.kv_bytes_per_token * kv_share
        return weights * sizes.value_bytes + kv + logits

    def step_flops(self, rows: int, tokens: int, attended: float) -> float:
        """Products and sums of such a step on one device."""
        sizes = self.sizes
        linear = 2 * (sizes.linear_weights * tokens + sizes.head_weights * rows)
        attention = 4 * sizes.num_layers * sizes.num_heads * sizes.head_dim * attended
        return (linear + attention) / self.num_devices

    def _sums_s(self, rows: int, tokens: int) -> float:
        """Two sums of the activations per layer and one of the embedding, around a ring; then the
        logits are gathered."""
        devices, sizes, assumed = self.num_devices, self.sizes, self.assumed
        if devices == 1:
            return 0.0
        num_sums = 2 * sizes.num_layers + 1
        share = (devices - 1) / devices * sizes.value_bytes
        moved = 2 * share * num_sums * tokens * sizes.width + share * rows * sizes.vocab_size
        bytes_per_s = self.device.link_bytes_per_s * assumed.link_share
        return (num_sums + 1) * assumed.sum_s + moved / bytes_per_s
