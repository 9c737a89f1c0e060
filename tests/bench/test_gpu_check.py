import copy
import json
import sys

import pytest

from jaxserve.bench import gpu_check, gpu_parts
from jaxserve.bench.gpu_check import Part
from jaxserve.errors import ConfigError

RATES = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 8e14}
ROW = {"kernel": "jaxserve", "shape": "decode 64 x 4k", "seconds": 3e-4, "copy_share": 0.9}
LIBRARY = {"peer": "torch flex", "shape": "64 x 4k", "seconds": 5e-4, "error": 1e-3, "note": ""}
GOOD = {
    "device": {"device": "abacus", "tiny": False},
    "correctness": {"checked": 2, "of": 9, "wrong": [], "worst_error": {"float32": 1e-6}},
    "kernels": {
        "device": "abacus",
        "rates": RATES,
        "rows": [
            {**ROW, "matrix_share": None, "note": ""},
            {**ROW, "kernel": "cudnn", "seconds": None, "copy_share": None, "matrix_share": None}
            | {"note": "needs luck"},
        ],
    },
    "engine": {
        "kernels": {"paged_attention": "pallas_gpu"},
        "steps": [
            {"rows": 64, "context": 1024, "step_s": 5e-3, "bytes": 1.6e10, "flops": 1e12},
            {"rows": 512, "context": 1, "step_s": 1e-2, "bytes": 1.6e10, "flops": 7.2e12},
        ],
        "batch": {"count": 64, "prompt_tokens": 512, "output_tokens": 128},
        "runs": [{"tokens_per_s": 3000.0}, {"tokens_per_s": 6000.0}],
    },
    "transformers": {"runs": [{"tokens_per_s": 1500.0}, {"tokens_per_s": 1000.0}]},
    "libraries": {"rows": [LIBRARY]},
    "profile": {"profile": {"errors": {"held_out": {"mean": 0.03}}}},
}


@pytest.fixture
def ran(monkeypatch):
    """Runs parts that write given numbers, and then the code that is given for them."""

    def run(numbers, then=None, **options):
        def command(name, path):
            code = f"open({path!r}, 'w').write({json.dumps(numbers[name])!r})\n"
            return [sys.executable, "-c", code + (then or {}).get(name, "")]

        return gpu_check.run_all(command, say=lambda line: None, **options)

    return run


def shorten(monkeypatch, name, limit_s):
    parts = {each: part._replace(limit_s=5.0) for each, part in gpu_check.PARTS.items()}
    parts[name] = parts[name]._replace(limit_s=limit_s)
    for each in list(parts)[: list(parts).index(name)]:
        parts[each] = parts[each]._replace(limit_s=0.0)
    monkeypatch.setattr(gpu_check, "PARTS", parts)


def test_numbers_of_several_parts_are_put_beside_each_other(ran):
    numbers = ran(GOOD)
    shares = [(step["bound"], step["share"]) for step in numbers["engine"]["steps"]]
    assert shares == [("memory", pytest.approx(0.8)), ("compute", pytest.approx(0.9))]
    assert gpu_check.passed(numbers)
    text = "\n".join(gpu_check.summary(numbers))
    assert "64 x 1024: 5.00 ms, roofline 4.00 ms (memory), 80.0%; pallas_gpu" in text
    assert "jaxserve     decode 64 x 4k             300.0 us  90.0%" in text
    # 64 rows of 4096 keys, 8 heads of 2 x 128 numbers of 2 bytes, at half of the copy's rate
    assert "torch flex   decode 64 x 4k             500.0 us  53.7%" in text
    assert "cudnn        decode 64 x 4k         needs luck" in text
    assert "64 x (512 + 128) tokens: 6,000 tokens/s" in text
    assert "the same batch: 1,500 tokens/s, ours is 4.00 times that" in text


def test_a_wrong_kernel_fails_the_check(ran):
    numbers = copy.deepcopy(GOOD)
    numbers["correctness"]["wrong"] = ["1,64,16,int8: 3.0e-01"]
    numbers = ran(numbers)
    assert not gpu_check.passed(numbers)
    assert "correctness  WRONG 1,64,16,int8: 3.0e-01" in list(gpu_check.summary(numbers))


def test_a_kernel_of_ours_without_a_time_fails_the_check(ran):
    numbers = copy.deepcopy(GOOD)
    numbers["kernels"]["rows"][0] |= {"seconds": None, "copy_share": None, "note": "no luck"}
    assert not gpu_check.passed(ran(numbers))


def test_a_part_that_dies_is_named_and_what_it_had_measured_is_told(ran):
    saved = []
    then = {"kernels": "raise SystemExit(3)", "transformers": "raise SystemExit(4)"}
    numbers = ran(GOOD, then, save=lambda numbers: saved.append(len(numbers)))
    assert not gpu_check.passed(numbers) and saved == [1, 2, 3, 4, 5, 6, 7]
    text = "\n".join(gpu_check.summary(numbers))
    assert "kernels      FAILED: exit code 3" in text and "300.0 us  90.0%" in text
    assert "transformers FAILED: exit code 4" in text and "ours is 4.00 times that" in text


def test_peers_that_fail_are_told_and_fail_nothing(ran):
    numbers = ran({**GOOD, "libraries": {"rows": []}}, {"libraries": "raise SystemExit(1)"})
    assert gpu_check.passed(numbers)
    assert "libraries    FAILED: exit code 1" in "\n".join(gpu_check.summary(numbers))


def test_a_part_out_of_time_is_stopped_with_all_that_it_started(ran, monkeypatch, tmp_path):
    shorten(monkeypatch, "profile", 1.0)
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parts = gpu_check.PARTS
    monkeypatch.setattr(gpu_check, "PARTS", {name: parts[name] for name in ("profile",)})
    numbers = ran({"profile": {"doing": "round 7", "some": 1}}, {"profile": code})
    assert numbers["profile"]["some"] == 1
    assert numbers["profile"]["error"] == "took longer than 1 s; it said last: round 7"
    assert numbers["profile"]["seconds"] < 2 and not mark.exists()


def test_later_parts_may_use_the_time_that_is_left(monkeypatch):
    said = []
    parts = {name: Part(lambda seconds, report: None, 0, 5.0) for name in ("one", "two", "three")}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    gpu_check.run_all(lambda name, path: ["true"], say=said.append)
    limits = [float(line.split()[-2]) for line in said]
    assert limits[0] == 5 and 9 <= limits[1] <= 10 and 13 <= limits[2] <= 15
    assert sum(part.limit_s for part in parts.values()) == 15


def test_all_limits_together_stay_under_nine_minutes():
    assert sum(part.limit_s for part in gpu_check.PARTS.values()) < 540


def test_a_gpu_that_jax_does_not_see_is_one_line_and_ends_the_check(
    ran, monkeypatch, tmp_path, capfd
):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "")
    with pytest.raises(ConfigError, match=r"NVIDIA GPU, .* runs on cpu; try: pip install 'jax\[cu"):
        gpu_parts.check_jax()
    output = tmp_path / "device.json"
    assert gpu_check.run_part("device", str(output), quick=True) == 2
    error = json.loads(output.read_text())["error"]
    assert capfd.readouterr().err == f"gpu_check: {error}\n"
    numbers = ran({"device": {"error": error}}, {"device": "raise SystemExit(2)"})
    assert list(gpu_check.summary(numbers)) == [f"device       FAILED: {error}"]
    assert not gpu_check.passed(numbers)


def test_a_report_is_whole_at_any_time_and_speaks_json(tmp_path):
    path = tmp_path / "part.json"
    report = gpu_parts.Report(path)
    rows = [{"error": float("inf"), "seconds": (1.0, float("nan"))}]
    report.save(rows=rows)
    report.numbers["rows"].append({"error": 1})
    report.save()
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "rows": [{"error": None, "seconds": [1.0, None]}, {"error": 1}]
    }


def test_peers_that_are_not_installed_are_said_to_be(monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    monkeypatch.setenv(gpu_parts.PEERS_PYTHON, str(bare))
    for part in (gpu_parts.transformers, gpu_parts.libraries):
        report = gpu_parts.Report(tmp_path / "part.json")
        part(1.0, report)
        assert "torch" in report.numbers["note"] and "not installed" in report.numbers["note"]
