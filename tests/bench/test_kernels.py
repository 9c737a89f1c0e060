"""Kernels are timed only where they are right; other libraries' are called as they want to be."""

import types

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxserve.bench import kernels
from jaxserve.bench.kernel_check import Batch, worst_error
from jaxserve.bench.peers.decode_shapes import TINY, read_bytes

RATES = kernels.Rates(1e9, 1e9)
SHAPE, LENGTHS = TINY.decode[1]


def test_what_kernels_are_held_against_is_attention():
    batch = Batch(0, [1, 40, 96], Q=1, C=32)
    operands = batch.operands()
    assert worst_error(kernels.exact(*operands[:4]), batch.reference()) < 1e-6


@pytest.mark.full
def test_jaxs_own_kernel_is_right_and_a_wrong_one_gets_no_time():
    def broken(decode):
        return kernels.Kernel(lambda q, *rest: q, decode[:4])

    def failing(decode):
        raise NotImplementedError("head size\nand a long trace")

    tried = {"jax": kernels.in_tree, "broken": broken, "failing": failing}
    rows = {row.kernel: row for row in kernels.decode_rows(TINY, SHAPE, LENGTHS, tried, RATES)}
    assert rows["jax"].seconds and rows["jax"].error and rows["jax"].error < 1e-2
    assert rows["broken"].seconds is None and rows["broken"].note.startswith("wrong: off by ")
    assert rows["failing"].note == "NotImplementedError: head size"


def test_cudnns_paged_attention_is_lowered_for_cuda(monkeypatch: pytest.MonkeyPatch):
    """As far as it goes without a GPU, and without cuDNN: it is asked for its version alone."""
    version = types.SimpleNamespace(cudnn_get_version=lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    decode = kernels.decode_operands(TINY, LENGTHS)
    kernel = kernels.cudnn(decode)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")]
    exported = jax.export.export(
        kernels.loop_of(kernel), platforms=["cuda"], disabled_checks=unchecked
    )(*kernel.operands)
    B, _, H, C = decode.q_BQHC.shape
    assert exported.out_avals[0].shape == (B, H, 1, C)
    assert "\\22is_paged_attention\\22: true" in exported.mlir_module()


def test_the_copys_array_is_given_back():
    rates = kernels.measure_rates(TINY)
    assert rates.copy_bytes_per_s > 0 and rates.matrix_flops_per_s > 0


def test_the_bytes_of_a_step_are_all_its_keys_and_values_once():
    assert read_bytes(TINY, (3, 40)) == 43 * 2 * 2 * 64 * 2
    assert read_bytes(TINY, (3, 40), itemsize=1) == 43 * 2 * 2 * (64 + 4)
