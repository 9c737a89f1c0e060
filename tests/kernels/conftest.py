"""What tests of kernels for absent chips share."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cases = list[dict[str, Any]]


@pytest.fixture
def compile_for_chips() -> Callable[[Cases], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Compiles cases for chips of one platform, in a process; returns each with its answer."""

    def compile_cases(cases: Cases) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        script = Path(__file__).with_name("compile_for_chips.py")
        given = "\n".join(map(json.dumps, cases))
        command = [sys.executable, script, cases[0]["topology"]]
        done = subprocess.run(command, input=given, capture_output=True, text=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(cases), done.stderr[-2000:]
        for case, answer in zip(cases, answers, strict=True):
            assert "error" not in answer, (case, answer["error"])
        return list(zip(cases, answers, strict=True))

    return compile_cases
