"""Which platform is named before JAX looks for devices."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.engine.devices import may_have_tpu

LOOK = """
import jax
from jaxserve.engine.devices import open_mesh
from jaxserve.models.config import SHAPES
print(open_mesh("tp=1", SHAPES["tiny"]).devices.flat[0].platform, jax.default_backend())
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


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    or importlib.util.find_spec("jax_plugins") is not None
    or may_have_tpu(),
    reason="needs libtpu and a machine with nothing but a CPU",
)
def test_libtpu_is_silent_where_there_is_no_tpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("cpu cpu\n", "")
