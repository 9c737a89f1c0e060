"""Which platform is named before JAX looks for devices."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.engine.devices import may_have_gpu, may_have_tpu

LOOK = """
import jax
from jaxserve.engine.devices import open_mesh
from jaxserve.models.config import SHAPES
print(open_mesh("tp=1", SHAPES["tiny"]).devices.flat[0].platform, jax.default_backend())
"""

NAMED = """
import jax
from jaxserve.engine.devices import name_lone_platform
name_lone_platform()
print(jax.config.values["jax_platforms"])
"""


@pytest.mark.parametrize(
    "path,text,answer",
    [
        ("sys/bus/pci/devices/0000:00:04.0/vendor", "0x1ae0\n", True),
        ("sys/bus/pci/devices/0000:00:04.0/vendor", "0x8086\n", False),
        ("dev/accel0", "", True),
        ("dev/vfio/0", "", True),
        ("dev/vfio/vfio", "", False),
    ],
)
def test_what_could_be_a_tpu_is_left_to_jax(tmp_path: Path, path, text, answer) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert may_have_tpu(tmp_path) is answer


@pytest.mark.parametrize(
    "path,answer",
    [("dev/nvidia0", True), ("dev/nvidiactl", True), ("dev/dxg", True), ("dev/null", False)],
)
def test_what_could_be_a_gpu_is_left_to_jax(tmp_path: Path, path, answer) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("")
    assert may_have_gpu(tmp_path) is answer


needs_cpu_alone = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or may_have_tpu() or may_have_gpu(),
    reason="needs libtpu and a machine with nothing but a CPU",
)


@needs_cpu_alone
def test_compilers_are_silent_where_there_is_no_chip() -> None:
    done = run(LOOK)
    assert (done.stdout, done.stderr) == ("cpu cpu\n", "")


@needs_cpu_alone
@pytest.mark.parametrize(
    "variable,platforms", [("PJRT_NAMES_AND_LIBRARY_PATHS", None), ("UNHEARD_OF", "cpu")]
)
def test_a_platform_that_the_environment_brings_is_left_to_jax(variable, platforms) -> None:
    assert run(NAMED, **{variable: "npu:/opt/npu.so"}).stdout == f"{platforms}\n"


def run(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **more}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
