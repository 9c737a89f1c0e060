import copy
import json
import re
import sys
from pathlib import Path

import pytest

from jaxserve.bench import gpu_check, gpu_parts, sampling_kernel
from jaxserve.bench.gpu_check import Part
from jaxserve.engine import build as engine_build
from jaxserve.engine.measure import GREEDY
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.errors import ConfigError
from jaxserve.models.info import ModelInfo

RATES = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 8e14}
ROW = {"kernel": "jaxserve", "shape": "decode 64 x 4k", "seconds": 3e-4, "copy_share": 0.9}
LIBRARY = {"peer": "torch flex", "shape": "64 x 4k", "seconds": 5e-4, "error": 1e-3, "note": ""}
SAMPLING = {"count": 64, "vocabulary": 99, "checked": 2, "of": 2, "at_boundary": 1, "wrong": []}
KIND = {"kind": "greedy", "kernel_s": 1e-5, "xla_s": 3e-3, "note": ""}
STEP = {"rows": 64, "context": 1024, "step_s": 5e-3, "sampled_step_s": 6.25e-3}
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
    "sampling": {
        **SAMPLING,
        "rows": [KIND, {**KIND, "kind": "top_k 50", "kernel_s": 1.1e-4, "xla_s": None}]
        + [{**KIND, "kind": "flat", "kernel_s": 1.01e-3}],
    },
    "engine": {
        "kernels": {"paged_attention": "pallas_gpu"},
        "steps": [
            {**STEP, "tokens": "a b c d", "bytes": 1.6e10, "flops": 1e12},
            {"rows": 512, "context": 1, "step_s": 1e-2, "sampled_step_s": 1e-2, "tokens": "e f"}
            | {"bytes": 1.6e10, "flops": 7.2e12},
        ],
        "batch": {"count": 64, "prompt_tokens": 512, "output_tokens": 128},
        "runs": [{"tokens_per_s": 3000.0}, {"tokens_per_s": 6000.0}],
    },
    "graphs": {"steps": [{**STEP, "step_s": 4e-3, "tokens": "a b x d"}]},
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


def test_sampled_decode_stands_beside_greedy_and_its_bound(ran):
    text = "\n".join(gpu_check.summary(ran(GOOD)))
    assert "64 x 1024 sampled (temperature 0.8, top_p 0.9): 6.25 ms, 0.80x of greedy" in text
    assert "512 x 1 sampled (temperature 0.8, top_p 0.9): 10.00 ms, 1.00x of greedy" in text
    assert "2 of 2 kinds of rows; 1 draws on a boundary" in text
    lines = [line for line in text.splitlines() if "64 x 99" in line]
    greedy, top_k, flat = (line.split(None, 4)[-1] for line in lines)
    assert greedy.endswith("10.0 us, decode 1.00x of greedy (bound 0.9); XLA 3000.0 us")
    assert top_k.endswith("110.0 us, decode 0.98x of greedy (bound 0.9)")
    assert flat.endswith("1010.0 us, decode 0.83x of greedy (bound 0.9, MISSED); XLA 3000.0 us")


def test_a_loop_in_a_cuda_graph_stands_beside_one_that_the_host_drives(ran):
    text = "\n".join(gpu_check.summary(ran(GOOD)))
    assert "graphs       64 x 1024: 4.00 ms, 0.800 of a step whose loop the host drives" in text
    assert "tokens of 75% of rows are the same" in text


def test_loops_go_into_cuda_graphs_in_one_part_and_other_flags_stay(ran, monkeypatch):
    show = "import json, os; json.dump({'flags': os.environ.get('XLA_FLAGS')}, open(%r, 'w'))"
    monkeypatch.setenv("XLA_FLAGS", "--some_flag=1")
    parts = {name: gpu_check.PARTS[name] for name in ("engine", "graphs", "profile")}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "_compare", lambda numbers: None)
    numbers = gpu_check.run_all(
        lambda name, path: [sys.executable, "-c", show % path], say=lambda line: None
    )
    added = "--xla_gpu_enable_command_buffer=+WHILE"
    assert {name: part["flags"] for name, part in numbers.items()} == {
        "engine": "--some_flag=1",
        "graphs": f"--some_flag=1 {added}",
        "profile": "--some_flag=1",
    }


def test_graphs_that_crash_are_told_and_fail_nothing(ran):
    numbers = ran({**GOOD, "graphs": {}}, {"graphs": "import os; os.abort()"})
    assert gpu_check.passed(numbers) and numbers["engine"]["steps"][0]["sampled_rate"]
    assert "graphs       FAILED: exit code -6" in "\n".join(gpu_check.summary(numbers))


def test_a_wrong_kernel_fails_the_check(ran):
    numbers = copy.deepcopy(GOOD)
    numbers["correctness"]["wrong"] = ["1,64,16,int8: 3.0e-01"]
    numbers = ran(numbers)
    assert not gpu_check.passed(numbers)
    assert "correctness  WRONG 1,64,16,int8: 3.0e-01" in list(gpu_check.summary(numbers))


def test_wrong_tokens_fail_the_check(ran):
    numbers = copy.deepcopy(GOOD)
    numbers["sampling"]["wrong"] = ["99, top_k 50: row 3: got token 1, wanted 2"]
    numbers = ran(numbers)
    assert not gpu_check.passed(numbers)
    told = "sampling     WRONG 99, top_k 50: row 3: got token 1, wanted 2"
    assert told in list(gpu_check.summary(numbers))


def test_a_kernel_of_ours_without_a_time_fails_the_check(ran):
    numbers = copy.deepcopy(GOOD)
    numbers["kernels"]["rows"][0] |= {"seconds": None, "copy_share": None, "note": "no luck"}
    assert not gpu_check.passed(ran(numbers))
    numbers = copy.deepcopy(GOOD)
    numbers["sampling"]["rows"][1] |= {"kernel_s": None, "note": "no luck"}
    numbers = ran(numbers)
    assert not gpu_check.passed(numbers)
    assert any("top_k 50         no luck" in line for line in gpu_check.summary(numbers))


@pytest.mark.parametrize("part", ["correctness", "sampling"])
def test_what_was_not_checked_did_not_pass(ran, part):
    numbers = copy.deepcopy(GOOD)
    numbers[part]["checked"] = 0
    assert not gpu_check.passed(ran(numbers))


def test_a_part_that_dies_is_named_and_what_it_had_measured_is_told(ran):
    saved = []
    then = {"kernels": "raise SystemExit(3)", "transformers": "raise SystemExit(4)"}
    numbers = ran(GOOD, then, save=lambda numbers: saved.append(len(numbers)))
    assert not gpu_check.passed(numbers) and saved == [*range(1, 10)]
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


def test_parts_and_limits_are_those_of_the_table_that_people_read():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)
    assert rows == [(name, f"{part.limit_s:.0f}") for name, part in gpu_check.PARTS.items()]


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


def test_wrong_kinds_of_rows_get_no_time(monkeypatch, tmp_path):
    def check(rows, vocabularies):
        for vocabulary in vocabularies:
            yield sampling_kernel.Case(vocabulary, "greedy", ())
            yield sampling_kernel.Case(vocabulary, "top_k 50", ("row 3: got token 1, wanted 2",))
            yield sampling_kernel.Case(vocabulary, "min_p 0.05", (), at_boundary=2)

    def measure(rows, vocabulary, kinds, *, budget_s):
        return [sampling_kernel.Timed(kind, 1e-5, 1e-3) for kind in kinds]

    monkeypatch.setattr(sampling_kernel, "check", check)
    monkeypatch.setattr(sampling_kernel, "measure", measure)
    report = gpu_parts.Report(tmp_path / "part.json")
    gpu_parts.sampling(1.0, report)
    numbers, vocabularies = report.numbers, sampling_kernel.TINY.vocabularies
    assert [row["kind"] for row in numbers["rows"]] == ["greedy", "min_p 0.05"]
    assert numbers["wrong"] == [
        f"{vocabulary}, top_k 50: row 3: got token 1, wanted 2" for vocabulary in vocabularies
    ]
    assert numbers["checked"] == 3 * len(vocabularies)
    assert numbers["at_boundary"] == 2 * len(vocabularies)


@pytest.mark.parametrize("part,programs", [("engine", [2, 8]), ("graphs", [2])])
def test_slices_are_timed_greedy_and_sampled_by_programs_that_they_need(
    monkeypatch, tmp_path, part, programs
):
    """Where the loop goes into a CUDA graph, of the smaller slice alone."""
    device, plans, built = ScriptedExecutor(vocab_size=97), [], []
    run, device.dispatch = device.dispatch, lambda plan: plans.append(plan) or run(plan)

    def build(config, source, model, progress, *, buckets, weigh):
        built.extend(buckets)
        info = ModelInfo(
            name="tiny",
            source=config.model,
            config=model,
            dtype="float32",
            num_pages=config.cache.num_pages,
            page_size=config.cache.page_size,
            programs=len(buckets),
            kernels={},
            platform="cpu",
            device_kind="scripted",
            num_devices=1,
        )
        return device, info, None

    monkeypatch.setattr(engine_build, "build_jax", build)
    monkeypatch.setattr(gpu_parts, "_run_batches", lambda deployment, report: None)
    monkeypatch.setenv("XLA_FLAGS", "--some_flag=1")
    report = gpu_parts.Report(tmp_path / "part.json")
    getattr(gpu_parts, part)(1.0, report)
    assert [bucket.rows for bucket in built if not bucket.tiles] == programs
    assert len(built) == len(programs) + 1  # one takes prompts, to start rows
    steps = report.numbers["steps"]
    assert [step["rows"] for step in steps] == programs
    assert all(step["step_s"] > 0 and step["sampled_step_s"] > 0 for step in steps)
    assert all(len(step["tokens"].split()) == 2 * step["rows"] for step in steps)
    params = [row.start.params for plan in plans for row in plan.rows if row.start is not None]
    assert params.count(gpu_parts.SAMPLED) == params.count(GREEDY) == 6 * sum(programs)
    assert report.numbers.get("xla_flags") == {"graphs": "--some_flag=1"}.get(part)
