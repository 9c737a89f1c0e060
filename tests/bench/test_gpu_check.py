import copy
import json
import sys

import pytest

from jaxserve.bench import gpu_check

RATES = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 8e14}
ROW = {"kernel": "jaxserve", "shape": "decode 64 x 4k", "seconds": 3e-4, "copy_share": 0.9}
GOOD = {
    "correctness": {"checked": 2, "of": 9, "wrong": [], "worst_error": {"float32": 1e-6}},
    "kernels": {
        "device": "abacus",
        "rates": RATES,
        "rows": [{**ROW, "matrix_share": None, "note": ""}],
    },
    "engine": {
        "kernels": {"paged_attention": "pallas_gpu"},
        "steps": [
            {"rows": 64, "context": 1024, "step_s": 5e-3, "bytes": 1.6e10, "flops": 1e12},
            {"rows": 512, "context": 1, "step_s": 1e-2, "bytes": 1.6e10, "flops": 7.2e12},
        ],
    },
    "profile": {"profile": {"errors": {"held_out": {"mean": 0.03}}}},
}


@pytest.fixture
def ran(monkeypatch):
    """Runs parts that write given numbers, or fail where there are none."""

    def run(numbers):
        def command(name, path):
            code = f"open({path!r}, 'w').write({json.dumps(numbers[name])!r})"
            return [sys.executable, "-c", code if numbers[name] else "raise SystemExit(3)"]

        return gpu_check.run_all(command, say=lambda line: None)

    return run


def test_steps_are_held_against_the_larger_of_both_rooflines(ran):
    numbers = ran(GOOD)
    shares = [(step["bound"], step["share"]) for step in numbers["engine"]["steps"]]
    assert shares == [("memory", pytest.approx(0.8)), ("compute", pytest.approx(0.9))]
    assert gpu_check.passed(numbers)
    text = "\n".join(gpu_check.summary(numbers))
    assert "64 x 1024: 5.00 ms, roofline 4.00 ms (memory), 80.0%; pallas_gpu" in text
    assert "decode 64 x 4k             300.0 us  90.0%" in text


def test_a_wrong_kernel_fails_the_check(ran):
    numbers = copy.deepcopy(GOOD)
    numbers["correctness"]["wrong"] = ["1,64,16,int8: 3.0e-01"]
    numbers = ran(numbers)
    assert not gpu_check.passed(numbers)
    assert "correctness  WRONG 1,64,16,int8: 3.0e-01" in list(gpu_check.summary(numbers))


def test_a_part_that_dies_is_named_and_the_others_are_told(ran):
    numbers = ran({**GOOD, "kernels": {}})
    assert not gpu_check.passed(numbers)
    text = "\n".join(gpu_check.summary(numbers))
    assert "kernels      FAILED: exit code 3" in text
    assert "64 x 1024: 5.00 ms; pallas_gpu" in text
