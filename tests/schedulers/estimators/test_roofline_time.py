"""The roofline, by hand for a model of ten numbers, and what it must grow and shrink with."""

from dataclasses import replace

import pytest

from jaxserve.schedulers.estimators.roofline_time import (
    DEVICES,
    Assumptions,
    Device,
    ModelSizes,
    RooflineTime,
)
from jaxserve.schedulers.estimators.serving_time import SliceShape

SIZES = ModelSizes(
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=16,
    vocab_size=32,
    tied_embeddings=True,
    value_bytes=2,
)
DEVICE = Device(
    kind="by hand",
    memory_bytes=1e6,
    memory_bytes_per_s=1000.0,
    flops=1e6,
    link_bytes_per_s=100.0,
    source="",
)
PERFECT = Assumptions(
    memory_share=1.0, compute_share=1.0, link_share=1.0, dispatch_s=0.0, step_s=0.0, sum_s=0.0
)
TIME = RooflineTime(sizes=SIZES, device=DEVICE, assumed=PERFECT)
# Per layer: q and out 2 * 8 * 8, k and v 2 * 8 * 4, three MLP matrices 3 * 8 * 16.
LINEAR = 2 * (128 + 64 + 384)
HEAD = 32 * 8
KV_BYTES = 2 * 2 * 1 * 4 * 2


def test_sizes_by_hand() -> None:
    assert SIZES.linear_weights == LINEAR and SIZES.kv_bytes_per_token == KV_BYTES
    assert SIZES.weight_bytes == 2 * (LINEAR + HEAD)
    assert replace(SIZES, tied_embeddings=False).weight_bytes == 2 * (LINEAR + 2 * HEAD)


def test_a_step_that_memory_bounds_by_hand() -> None:
    rows, attended = 3, 50.0
    weights = 2 * (LINEAR + HEAD + rows * 8)
    logits = 2 * 4 * rows * 32
    by_hand_s = (weights + KV_BYTES * (attended + rows) + logits) / 1000
    assert TIME.step_s(rows, attended) == pytest.approx(by_hand_s)
    assert TIME.slice_s(SliceShape(4, rows, 200, 0)) == pytest.approx(4 * by_hand_s)


def test_a_step_that_compute_bounds_by_hand() -> None:
    slow = replace(TIME, device=replace(DEVICE, flops=100.0, memory_bytes_per_s=1e9))
    rows, attended, prompt, prompt_attended = 3, 50.0, 64, 700
    flops = 2 * LINEAR * (rows + prompt) + 2 * HEAD * rows
    flops += 4 * 2 * 2 * 4 * (attended + prompt_attended)
    assert slow.step_s(rows, attended, prompt, prompt_attended) == pytest.approx(flops / 100)


def test_sums_over_devices_by_hand() -> None:
    two = replace(TIME, num_devices=2, assumed=replace(PERFECT, sum_s=0.5))
    rows = 3
    moved = 2 * 0.5 * 2 * (2 * 2 + 1) * rows * 8 + 0.5 * 2 * rows * 32
    # One kv head is held by both.
    weights = 2 * ((LINEAR + HEAD) / 2 + rows * 8)
    memory_s = (weights + KV_BYTES * rows + 2 * 4 * rows * 32) / 1000
    assert two.step_s(rows, 0.0) == pytest.approx(memory_s + 6 * 0.5 + moved / 100)


@pytest.mark.parametrize("name", DEVICES)
def test_what_costs_more_on_every_device(name: str) -> None:
    sizes = replace(SIZES, width=4096, mlp_width=14336, num_layers=32, vocab_size=128256)
    time = RooflineTime(sizes=sizes, device=DEVICES[name])
    shape = SliceShape(8, 16, 8 * 16 * 300, 512, 512 * 200)
    for more in (
        shape._replace(steps=9),
        shape._replace(rows=32),
        shape._replace(attended_tokens=10**7),
        shape._replace(prefill_tokens=2048),
        shape._replace(prefill_attended_tokens=10**8),
    ):
        assert time.slice_s(more) > time.slice_s(shape)
    lower = replace(time, assumed=Assumptions(memory_share=0.5, compute_share=0.3))
    assert lower.slice_s(shape) > time.slice_s(shape)
