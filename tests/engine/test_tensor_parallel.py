"""Four devices compute what one computes, with two sums over them per layer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("forced_devices.py")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the script reports, from a process with devices of its own."""
    environment = {name: value for name, value in os.environ.items() if "NUM_CPU" not in name}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["tiny-4", "tiny"], ids=["a head each", "two kv heads for four"])
def test_tokens_on_four_devices_equal_a_full_recompute_on_one(found: dict, model: str) -> None:
    assert found["devices"] == 4
    assert found["tokens"][model] == 2 * 8 * 12


@pytest.mark.parametrize("program,steps", [("8 rows", 1), ("8 rows + 32 prompt tokens", 2)])
def test_a_compiled_step_sums_twice_per_layer(found: dict, program: str, steps: int) -> None:
    """And once for the embedding; the logits are gathered."""
    sums = 2 * found["layers"] + 1
    assert found["collectives"][program] == {"all-reduce": steps * sums, "all-gather": steps}
