"""What has no kernel is refused at start-up, with what has one; what was picked is said."""

from dataclasses import dataclass, replace

import pytest

from jaxserve.config import CacheConfig, EngineConfig
from jaxserve.engine.kernel_choice import KernelChoice, choose_kernels
from jaxserve.errors import ConfigError
from jaxserve.models.config import SHAPES

LLAMA, TINY = SHAPES["llama3-8b"], SHAPES["tiny"]


@dataclass(frozen=True)
class Device:
    """As much of a `jax.Device` as tells what it can do."""

    platform: str
    device_kind: str
    compute_capability: str = ""


CPU = Device("cpu", "cpu")
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
H200 = Device("gpu", "NVIDIA H200", "9.0")
V5E, V5P = Device("tpu", "TPU v5 lite"), Device("tpu", "TPU v5")
V6E, V7X = Device("tpu", "TPU v6 lite"), Device("tpu", "TPU7x")


def choose(device, *, model=LLAMA, kernels="auto", dtype="bfloat16", **cache) -> KernelChoice:
    config = EngineConfig(kernels=kernels, cache=CacheConfig(**cache))
    return choose_kernels(config, model, dtype=dtype, device=device)


def test_each_platform_has_its_kernels_and_stores_the_models_type() -> None:
    chosen = choose(CPU, dtype="float32")
    assert chosen.names() == {"paged_attention": "cpu", "kv_write": "xla", "sampling": "xla"}
    assert str(chosen).endswith("; keys and values in float32")
    assert choose(V5E).names()["paged_attention"] == "pallas_tpu"
    assert choose(V5E, kernels="xla").names()["paged_attention"] == "xla"
    assert set(choose(H200).names().values()) == {"pallas_gpu"}
    assert choose(V5E).names()["sampling"] == "xla"


def test_a_kernel_that_is_interpreted_is_called_so() -> None:
    chosen = choose(CPU, model=TINY, kernels="pallas_tpu", dtype="float32")
    assert chosen.names()["paged_attention"] == "pallas_tpu (interpreted)"
    assert "paged_attention pallas_tpu (interpreted), kv_write pallas_tpu (int" in str(chosen)


@pytest.mark.parametrize("device", [A100, V5E, V5P])
def test_fp8_is_refused_on_chips_without_it(device) -> None:
    message = f"kv_dtype: got 'float8_e4m3fn'; allowed on {device.device_kind}, which has no fp8:"
    with pytest.raises(ConfigError, match=message):
        choose(device, kernels="xla", kv_dtype="float8_e4m3fn")


@pytest.mark.parametrize("device", [H200, V6E, V7X, CPU])
def test_fp8_is_taken_by_chips_that_have_it_and_in_software(device) -> None:
    assert choose(device, kernels="xla", kv_dtype="float8_e4m3fn").kv_dtype == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_dtype": "int8"}, "kv_dtype: got 'int8'; allowed: float32, bfloat16"),
        ({"model": replace(TINY, head_dim=20)}, "head_dim: got 20; allowed: multiples of 8"),
        ({"kernels": "pallas_tpu", "page_size": 256}, "page_size: got 256; allowed"),
        (
            {"kernels": "pallas_gpu", "model": replace(LLAMA, vocab_size=2**19 + 1)},
            "vocabulary: got 524289; allowed: up to 524288 .kernels pallas_gpu.; or",
        ),
        ({"kernels": "pallas"}, "kernels: kernel backend 'pallas' does not run on 'cpu'; try auto"),
        ({"kernels": "cuda"}, "kernels: kernel backend 'cuda' does not run on 'cpu'; try auto"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_what_does(given, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose(CPU, **given)
    named = "or --kernels=xla, which takes any" in str(caught.value)
    assert named or "try auto or one of" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "model", "kv_dtype", "bytes_per_head"),
    [
        (CPU, LLAMA, "float32", 2 * 128 * 4),
        (CPU, LLAMA, "bfloat16", 2 * 128 * 2),
        (V5E, LLAMA, "bfloat16", 2 * 128 * 2),
        (V5E, LLAMA, "int8", 2 * (128 + 4)),
        (V6E, LLAMA, "float8_e4m3fn", 2 * (128 + 4)),
        (V5E, replace(LLAMA, head_dim=80), "bfloat16", 256 * 2),  # filled up to whole lanes
    ],
)
def test_memory_counts_scales_and_filled_lanes(device, model, kv_dtype, bytes_per_head) -> None:
    heads = model.num_layers * model.num_kv_heads
    chosen = choose(device, model=model, kv_dtype=kv_dtype)
    assert chosen.bytes_per_token(model, 64) == heads * bytes_per_head


def test_pools_that_the_gpu_kernels_cannot_address_are_refused() -> None:
    gib = 2**30 // (2 * 128 * 8 * 32 * 64)  # pages that hold 2**30 numbers
    one_byte = KernelChoice("pallas_gpu", "gpu", "int8")
    for num_pages, num_devices in ((2 * gib - 1, 1), (4 * gib + 1, 1), (3 * gib, 2)):
        one_byte.check_pool(LLAMA, num_pages, 64, num_devices=num_devices)
    message = f"num_pages: got {3 * gib}, 3.00 GiB of int8 on a device; allowed: less than 2"
    with pytest.raises(ConfigError, match=message):
        one_byte.check_pool(LLAMA, 3 * gib, 64, num_devices=1)
    wide = KernelChoice("pallas_gpu", "gpu", "bfloat16")
    wide.check_pool(LLAMA, 3 * gib, 64, num_devices=1)
