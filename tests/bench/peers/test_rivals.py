"""Torch's attention kernels and transformers' `generate_batch`, run for real where they are.

GPU_CHECK_PEERS_PYTHON names a Python that has torch and transformers, if this one has not.
"""

import os
import sys

import pytest

from jaxserve.bench.gpu_parts import PEERS_PYTHON
from jaxserve.bench.peers.decode_shapes import LARGEST_ERROR, TINY
from jaxserve.bench.peers.protocol import KernelResult, WorkloadResult
from jaxserve.bench.peers.run import missing_modules, run_module

PYTHON = os.environ.get(PEERS_PYTHON, sys.executable)


@pytest.fixture(scope="module", autouse=True)
def peers_python():
    missing = missing_modules(PYTHON, ["torch", "transformers"])
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed; {PEERS_PYTHON} names another")


def test_flex_attention_over_pages_is_attention():
    results = list(run_module(PYTHON, "attention_kernels", ["--sizes=tiny"]))
    assert all(isinstance(result, KernelResult) for result in results)
    flex = {each.shape: each for each in results if each.peer == "torch flex"}
    assert list(flex) == [name for name, _ in TINY.decode]
    for result in flex.values():
        assert result.seconds and result.error and 1e-6 < result.error < LARGEST_ERROR, result
    assert all(each.note for each in results if each.peer == "flashinfer")


def test_generate_batch_makes_every_token_that_was_asked_for():
    arguments = ["--shape=tiny", "--device=cpu", "--requests=3"]
    arguments += ["--prompt_tokens=20", "--output_tokens=5"]
    results = list(run_module(PYTHON, "generate_batch", arguments))
    assert [type(result) for result in results] == [WorkloadResult] * 2
    assert all(result.useful_tokens == 15 and result.wall_s > 0 for result in results)
