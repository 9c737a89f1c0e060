"""`jaxserve compile`: what it says of a deployment, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve import launch
from jaxserve.bench import gpu_check
from jaxserve.engine.compile_report import DeploymentReport, ProgramReport
from jaxserve.models.gpu_target import GPU_LIMITS
from jaxserve.models.topology import GPUS, TOPOLOGIES, TPUS, parse_topology

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="needs libtpu: pip install 'jaxserve[tpu]'"
)
needs_ptxas = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("nvidia") is None,
    reason="needs NVIDIA's compilers: pip install 'jaxserve[gpu-compile]'",
)


def compile_in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: libtpu is told what it is before JAX is loaded."""
    return subprocess.run(
        [sys.executable, "-m", "jaxserve", "compile", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "topology,message",
    [
        ("v5e:3x3", "topology: got 'v5e:3x3'; allowed: v5e:1x1, 2x2, 2x4"),
        ("v7x:2x2", "topology: got 'v7x:2x2'; allowed: v5e:1x1, "),
        ("h200:3", "topology: got 'h200:3'; allowed: h200:1, 2, 4, 8"),
        ("v5e", "topology: got 'v5e'; allowed: v5e:1x1, 2x2"),
        ("", "topology: got ''; allowed: one such as v5e:2x2"),
    ],
)
def test_an_unknown_topology_is_refused(topology: str, message: str, capsys) -> None:
    assert launch.main(["compile", "--model=random:tiny", f"--topology={topology}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("topology,extra", [("v5e:2x2", "tpu"), ("h200:1", "gpu-compile")])
def test_a_machine_without_the_compiler_is_told_what_to_install(
    topology: str, extra: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch.main(["compile", "--model=random:tiny", f"--topology={topology}"]) == 2
    assert f"pip install 'jaxserve[{extra}]'" in capsys.readouterr().err


def test_every_topology_has_a_data_sheet_and_a_name_of_its_own() -> None:
    found = [parse_topology(f"{chip}:{sides}") for chip in TOPOLOGIES for sides in TOPOLOGIES[chip]]
    assert all(each.device.memory_bytes > 0 for each in found)
    assert {each.platform for each in found} == {"tpu", "gpu"} and not TPUS.keys() & GPUS.keys()
    assert GPU_LIMITS.keys() == GPUS.keys()
    assert {
        parse_topology("v5e:2x2").accelerator_type,
        parse_topology("v5p:2x2x1").accelerator_type,
    } == {"v5litepod-4", "v5p-8"}


def make_report(**fields) -> DeploymentReport:
    program = ProgramReport(
        name="8 rows",
        compile_s=1.0,
        temporary_bytes=fields.pop("temporary_bytes", 10),
        code_bytes=1,
        aliased_bytes=fields.pop("aliased_bytes", 100),
        pool_copies=fields.pop("pool_copies", {}),
        collectives={"all-reduce": 5.0},
        step=None,
    )
    return DeploymentReport(
        model="tiny",
        num_parameters=1,
        topology="v5e:2x2",
        device="TPU v5e",
        num_devices=4,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        kernels={},
        versions={},
        page_size=16,
        num_pages=4,
        kv_copies=1,
        max_context=64,
        context=16,
        memory_bytes=200,
        memory_share=1.0,
        weight_bytes=50,
        pool_bytes=100,
        state_bytes=1,
        compile_s=1.0,
        programs=(program,),
    )


@pytest.mark.parametrize(
    "fields,fault",
    [
        ({"temporary_bytes": 60}, "does not fit"),
        ({"aliased_bytes": 99}, "8 rows: its KV pages are not aliased"),
        ({"pool_copies": {"copy bf16[100]": 2}}, "8 rows: copies KV pages: 2 x copy bf16[100]"),
    ],
)
def test_what_is_wrong_with_a_deployment_is_said(fields: dict, fault: str) -> None:
    assert not make_report().faults()
    assert [text for text in make_report(**fields).faults() if text.startswith(fault)]


@needs_libtpu
def test_weights_that_do_not_fit_are_refused_before_anything_is_compiled() -> None:
    done = compile_in_process("--model=random:llama3-70b", "--topology=v5e:2x2")
    assert done.returncode == 2 and "compiled" not in done.stderr
    assert "does not fit: 35.28 GB of weights on each of 4" in done.stderr


@needs_libtpu
def test_a_type_that_the_chip_has_not_is_refused_before_anything_is_compiled() -> None:
    done = compile_in_process(
        "--model=random:llama3-8b", "--topology=v5e:2x2", "--kv_dtype=float8_e4m3fn"
    )
    assert done.returncode == 2 and "compiled" not in done.stderr
    assert "kv_dtype: got 'float8_e4m3fn'; allowed on TPU v5 lite, which has no fp8" in done.stderr


@needs_ptxas
def test_a_pool_that_the_kernels_cannot_address_is_refused_before_anything_is_compiled() -> None:
    done = compile_in_process(
        "--model=random:llama3-8b", "--topology=h200:1", "--kv_dtype=int8", "--num_pages=600"
    )
    assert done.returncode == 2 and "compiled" not in done.stderr
    assert "num_pages: got 600, 2.34 GiB of int8 on a device; allowed:" in done.stderr


@needs_ptxas
@pytest.mark.parametrize(
    "name,text,error",
    [
        ("XLA_CLIENT_MEM_FRACTION", "0.1", "h200:1, 14.10 GB a chip; does not fit: 16.06 GB"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "much", "XLA_PYTHON_CLIENT_MEM_FRACTION: got 'much'"),
    ],
)
def test_what_a_process_may_take_of_a_gpu_is_as_jax_is_told(
    name: str, text: str, error: str, monkeypatch
) -> None:
    monkeypatch.setenv(name, text)
    done = compile_in_process("--model=random:llama3-8b", "--topology=h200:1")
    assert done.returncode == 2 and error in done.stderr, done.stderr


@needs_libtpu
def test_pages_that_do_not_fit_are_refused() -> None:
    done = compile_in_process(
        "--model=random:tiny",
        "--topology=v5e:1x1",
        "--max_rows=1",
        "--max_prefill_tokens=32",
        "--num_pages=4000000",
    )
    assert done.returncode == 2 and "does not fit" in done.stderr, done.stderr


@needs_libtpu
def test_a_deployment_is_compiled_without_a_tpu(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = compile_in_process(
        "--model=random:tiny",
        "--topology=v5e:2x2",
        "--max_rows=1",
        "--max_prefill_tokens=32",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    assert "compiled 4/4" in done.stderr and "each kv head held 2 times" in done.stdout
    report = json.loads(path.read_text())
    assert report["schema"] == "jaxserve.compile/1" and not report["faults"]
    assert report["kernels"]["paged_attention"] == "pallas_tpu"
    assert [program["name"] for program in report["programs"]] == [
        "1 rows",
        "1 rows + 32 prompt tokens",
        "page copies",
        "sampling extras",
    ]
    for program in report["programs"]:
        assert program["aliased_bytes"] >= report["pool_bytes"] and not program["pool_copies"]
    # Two layers of two sums, the embedding's, and the logits, which may be gathered by a sum.
    assert {sum(p["collectives"].values()) for p in report["programs"][:2]} == {6}


@needs_ptxas
def test_a_deployment_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    """Besides what holds of a TPU: the host decides nothing but whether the slice goes on."""
    path = tmp_path / "report.json"
    done = compile_in_process(
        "--model=random:tiny",
        "--topology=h200:2",
        "--max_rows=1",
        "--max_prefill_tokens=32",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    assert "2 x NVIDIA H200" in done.stdout and "75% of its memory" in done.stdout
    report = json.loads(path.read_text())
    assert not report["faults"] and report["kernels"]["paged_attention"] == "pallas_gpu"
    for program in report["programs"]:
        assert program["aliased_bytes"] >= report["pool_bytes"] and not program["pool_copies"]
    slices = report["programs"][:2]
    assert {sum(program["collectives"].values()) for program in slices} == {6}
    assert {program["host"]["waits"] for program in slices} == {1}
    assert all(0 < program["host"]["step_launches"] < 60 for program in slices)
    kernels = {kernel["name"]: kernel for kernel in report["gpu_kernels"]}
    attention = {f"paged_attention_{name}" for name in ("decode", "join", "tiles")}
    assert kernels.keys() == attention | {"kv_write", "sample"}
    for kernel in kernels.values():
        assert kernel["spilled_bytes"] == 0 and kernel["per_core"] >= 1, kernel


@needs_ptxas
@pytest.mark.full
def test_a_slice_with_its_loop_in_a_cuda_graph_is_left_to_the_device(tmp_path: Path) -> None:
    """As `scripts/gpu_check` compiles it in its part `graphs`."""
    path = tmp_path / "report.json"
    done = compile_in_process(
        "--model=random:tiny",
        "--topology=h200:1",
        "--max_rows=1",
        "--max_prefill_tokens=32",
        f"--json={path}",
        XLA_FLAGS=gpu_check.PARTS["graphs"].xla_flags,
    )
    assert done.returncode == 0, done.stderr
    for program in json.loads(path.read_text())["programs"][:2]:
        assert program["host"]["waits"] == 0 < program["host"]["step_launches"]
