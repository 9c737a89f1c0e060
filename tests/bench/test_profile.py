"""`jaxserve profile` as a person runs it: what it writes, prints and refuses."""

from pathlib import Path

import pytest

from jaxserve.launch import main
from jaxserve.models.profile import find_profile


def test_a_computed_profile_is_written_and_reported(tmp_path: Path, capsys) -> None:
    path = tmp_path / "v6e.json"
    flags = ["--computed", "--device=v6e", "--model=random:llama3-8b", "--page_size=32"]
    assert main(["profile", *flags, f"--output={path}"]) == 0
    profile, said = find_profile(str(path)), capsys.readouterr().out
    assert profile.kind == "computed" and profile.page_size == 32 and profile.num_devices == 1
    assert "computed: llama3-8b in bfloat16 on 1 x TPU v6e" in said and profile.key in said
    assert "bilinear prefill" in said and "note: computed, not measured: cloud.google.com" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "output: got ''; allowed: a file"),
        (("--output=x", "--minutes=0"), "minutes: got 0.0; allowed: a positive number"),
        (
            ("--output=x", "--computed"),
            "device: got ''; allowed: one of h200, h100, a100, v5e, v5p, v6e",
        ),
        (("--output=x", "--device=v5e"), "device: got 'v5e'; allowed: one of h200"),
        (
            ("--output=x", "--computed", "--device=v5e", "--model=random:llama3-70b"),
            "leave nothing beside 141 GB of weights; allowed: more devices",
        ),
        (("--output=x", "--executor=mock"), "executor: got 'mock'; allowed: jax"),
        (
            ("--output=x", "--computed", "--device=v5e", "--dtype=float32"),
            "dtype: got 'float32'; allowed: bfloat16",
        ),
        (
            ("--output=no/such/x", "--computed", "--device=h200", "--model=random:llama3-8b"),
            "output: 'no/such/x': No such file",
        ),
        (("--output=x", "--live_log=no.jsonl"), "live_log: 'no.jsonl': No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags, said: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
