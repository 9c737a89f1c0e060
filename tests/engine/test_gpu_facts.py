"""What is read of a program for a GPU from XLA's dumps, on short texts of their form."""

from pathlib import Path

import pytest

from jaxserve.engine.gpu_facts import HostWork, host_work, thunks
from jaxserve.errors import ConfigError
from jaxserve.models.gpu_target import GPU_LIMITS

# A slice whose sampling the host still decides: two branches, one of them in a command buffer.
SLICE = """
000: kCommandBuffer [source | next=001 (1)]
    001: kCopy         [source | sink] kCopy
002: kWhile         [prev=000 (1) | sink]
condition:
    003: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    000: kCommandBuffer [source | next=012 (1)]
        004: kCustomKernel [source | sink] gemm_fusion grid: [9, 1, 1] threads: [64, 1, 1]  shared_memory: 768 bytes
        005: kConditional [source | sink]
          false_branch:
            006: kCustomKernel [source | sink] a grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
          true_branch:
            007: kCopy [source | sink] kCopy
    008: kAsyncStart [source | sink] stream=communication_stream[0], async_id=23
        009: kAllReduce [source | sink] kAllReduce
    010: kAsyncDone [source | sink] async_id=23
    012: kConditional [source | sink]
      true_branch:
        013: kWhile [source | sink]
condition:
            014: kCustomKernel [source | sink] b grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
          body:
            015: kCustomKernel [source | sink] c grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
016: kCopy [source | sink] kCopy
"""  # noqa: E501


def test_host_decides_what_no_command_buffer_holds() -> None:
    """The slice's loop, the second branch and the loop in it; launched are the loop's condition,
    the product and the sum over devices."""
    assert host_work(SLICE) == HostWork(waits=3, step_launches=3)


def test_a_program_without_a_loop_has_no_step() -> None:
    assert host_work("000: kCopy [source | sink] kCopy") == HostWork(0, 0)


def test_the_largest_program_of_a_dump_counts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dumps no .*thunk_sequence.txt"):
        thunks(tmp_path)
    (tmp_path / "c.thunk_sequence.txt").write_text("before passes")
    assert thunks(tmp_path) == "before passes"
    for name, text in (("a", "short"), ("b", SLICE)):
        (tmp_path / f"{name}.thunk_sequence_after_thunk_passes.txt").write_text(text)
    assert thunks(tmp_path) == SLICE


@pytest.mark.parametrize(
    "registers,threads,shared_bytes,programs",
    [
        (128, 128, 0, 4),  # 16 warps of 4,096 registers
        (24, 32, 0, 32),  # no more programs than that
        (16, 1024, 0, 2),  # nor more threads
        (32, 128, 72 << 10, 3),  # 73 KiB each, of 228
        (129, 128, 0, 3),  # rounded up to 136
    ],
)
def test_programs_that_fit_a_multiprocessor(registers, threads, shared_bytes, programs) -> None:
    fit = GPU_LIMITS["h200"].programs_per_core(
        registers=registers, threads=threads, shared_bytes=shared_bytes
    )
    assert fit == programs
