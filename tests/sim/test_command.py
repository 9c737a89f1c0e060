"""`jaxserve simulate` from the command line: what it writes, and what it says of mistakes."""

import gzip
import json
from pathlib import Path

import pytest

from jaxserve import launch
from jaxserve.report.report import read_report

FEW = ("--workload_options=clients=2", "--num_requests=8", "--rate=20")


def simulate(*arguments: str) -> int:
    return launch.main(["simulate", *arguments])


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Four requests of one client, without prefixes."""
    lines = [{"meta": {"source": "a test"}}]
    lines += [
        {
            "arrival_s": 0.1 * number,
            "client": "a",
            "prompt_tokens": 40,
            "output_tokens": 8,
            "block_hashes": None,
            "session": None,
        }
        for number in range(4)
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return str(path)


@pytest.mark.parametrize("preset", ["d2lpm", "ils", "larry_sal", "sls", "scls", "scls_resident"])
def test_a_preset_is_simulated_and_reported(preset: str, tmp_path: Path, capfd) -> None:
    path = tmp_path / "run.json"
    files = [f"--json={path}", f"--html={tmp_path / 'a.html'}", f"--csv={tmp_path / 'a.csv'}"]
    assert simulate(*FEW, f"--preset={preset}", "--replicas=2", *files) == 0
    out, _ = capfd.readouterr()
    assert f"*preset={preset}" in out and f"fair_mix: {preset}, 2 replicas of h200" in out
    report = read_report(str(path))
    assert report.about.kind == "simulated" and report.about.configuration["preset"] == preset
    assert report.about.profile["key"] and report.about.profile["kind"] == "computed"
    assert report.rows is not None and len(report.rows["number"]) == 8
    assert {"stop", "length"} >= set(report.rows["reason"])
    assert "</html>" in (tmp_path / "a.html").read_text()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 9


def test_a_trace_is_simulated_twice_alike(trace: str, tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        path = tmp_path / "run.json"
        assert simulate(f"--trace={trace}", f"--json={path}", "--noise=1", "--seed=3") == 0
        texts.append(path.read_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile=none"], "profile: got 'none'; allowed: a JSON file"),
        (["--preset=fair"], "preset: got 'fair'; allowed: default, sls"),
        (["--routing=nearest"], "routing: got 'nearest'; allowed: round_robin"),
        (["--pool=scls", "--order=vtc"], "order: got a value with --pool=scls"),
        (["--pool_options=step=ab"], "pool_options: got some without --pool"),
        (["--page_size=32"], "page_size: got 32; allowed: 64, as in the profile"),
        (["--max_context=64"], "allowed: 64 together, the model's context"),
        (["--workload=independent", "--order=lpm"], "order=lpm: got workload 'independent'"),
        (["--fail=0"], "fail: got '0'; allowed: <replica>:<seconds"),
        (["--html=/no/where/a.html"], "html: got '/no/where/a.html'"),
        (["--executor=jax"], "unknown flag --executor"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, capfd) -> None:
    assert simulate(*FEW, *arguments) == 2
    out, err = capfd.readouterr()
    assert message in err and err.startswith("jaxserve: ") and err.count("\n") == 1
    assert "simulated)" not in out


def test_a_broken_trace_is_named_by_file_and_line(trace: str, tmp_path: Path, capfd) -> None:
    lines = gzip.decompress(Path(trace).read_bytes()).decode().splitlines()
    lines[2] = lines[2].replace('"output_tokens": 8', '"output_tokens": -8')
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines))
    assert simulate(f"--trace={broken}") == 2
    err = capfd.readouterr().err
    assert "broken.jsonl" in err and "line 3" in err and "output_tokens" in err
