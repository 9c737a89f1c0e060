"""From settings to a workload and its feed; contradictions are found before anything runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve import flag_table, flags
from jaxserve.errors import ConfigError
from jaxserve.workload.config import WorkloadConfig
from jaxserve.workload.load import (
    load_workload,
    require_clients,
    require_prefixes,
    require_sessions,
)

LINES = (
    {"meta": {"name": "small", "block_size": None}},
    {"arrival_s": 0.0, "prompt_tokens": 100, "output_tokens": 7},
    {"arrival_s": 1.0, "prompt_tokens": 30, "output_tokens": 4},
    {"arrival_s": 4.0, "prompt_tokens": 30, "output_tokens": 4},
)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return str(path)


def test_a_trace_is_changed_as_told(trace: str) -> None:
    config = WorkloadConfig(trace=trace, num_requests=2, rate=10.0, max_tokens=64)
    workload, make_feed = load_workload(config, max_context=128)
    first, second = workload.requests()
    assert (first.max_tokens, second.max_tokens) == (28, 64)
    assert second.arrival_s == pytest.approx(0.1)
    for _ in range(2):  # each feed starts over
        assert len(make_feed().take(1.0)) == 2


def test_nothing_said_is_a_workload_with_clients_and_prefixes() -> None:
    workload, _ = load_workload(WorkloadConfig())
    assert (workload.name, workload.num_requests) == ("fair_mix", 1000)
    require_clients(workload, "vtc")
    require_prefixes(workload, "lpm")


def test_a_generator_is_made_as_told() -> None:
    config = WorkloadConfig(
        workload="chat",
        workload_options=("rate=2", "clients=2"),
        num_requests=40,
        seed=3,
        loop="closed",
        concurrency=3,
        per_client=True,
    )
    workload, make_feed = load_workload(config)
    assert len(list(workload.requests())) == 40
    assert len(make_feed().take(0.0)) == 6


def test_a_request_beyond_the_context_is_refused_or_cut(trace: str) -> None:
    with pytest.raises(ConfigError, match="small, request 0: got 100 prompt and 7 .* too_long=cut"):
        load_workload(WorkloadConfig(trace=trace), max_context=64)
    workload, _ = load_workload(WorkloadConfig(trace=trace, too_long="cut"), max_context=64)
    assert next(workload.requests()).prompt_tokens == 57


def test_what_a_policy_needs_is_said(trace: str) -> None:
    workload, _ = load_workload(WorkloadConfig(trace=trace))
    for require, lacking in (
        (require_prefixes, "shared prefixes"),
        (require_clients, "clients"),
        (require_sessions, "sessions"),
    ):
        with pytest.raises(
            ConfigError, match=f"order=x: got workload 'small', .* no {lacking};.*try"
        ):
            require(workload, "order=x")
    for settings in (
        {"loop": "sessions"},
        {"loop": "closed", "concurrency": 1, "per_client": True},
    ):
        with pytest.raises(ConfigError, match="which has no"):
            load_workload(WorkloadConfig(trace=trace, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace": "x", "workload": "chat"}, "workload: got 'chat'; allowed: unset beside a trace"),
        ({"trace": "x", "workload_options": ("a=1",)}, "workload_options: got .*unset beside"),
        ({"trace_format": "csv"}, "trace_format: got 'csv'; allowed: auto, jaxserve"),
        ({"trace_format": "azure"}, "trace_format: got 'azure'; allowed: unset without a trace"),
        ({"jitter_s": 3.0}, "jitter_s: got 3.0; allowed: unset without a trace"),
        ({"client_from": "session"}, "client_from: got 'session'; allowed: unset without a trace"),
        ({"client_from": "who"}, "client_from: got 'who'; allowed: auto, client, session, none"),
        ({"trace": "x", "trace_from_s": 5.0, "trace_until_s": 5.0}, "trace_until_s: got 5.0"),
        ({"workload": "chap"}, "workload: got 'chap'; .* did you mean 'chat'"),
        ({"workload_options": ("a=1",)}, "workload_options: unknown parameter 'a'"),
        ({"rate": 0.0}, "rate: got 0.0; allowed: a positive number"),
        ({"rate": 1.0, "workload_options": ("rate=2",)}, "rate: got 1.0; allowed: unset beside"),
        ({"rate": 1.0, "time_scale": 1.0}, "time_scale: got 1.0; allowed: one of rate and"),
        ({"loop": "closed", "concurrency": 1, "rate": 1.0}, "rate: got 1.0; .*loop=closed"),
        ({"concurrency": 3}, "concurrency: got 3; allowed: unset with loop=open"),
        ({"num_requests": 0}, "num_requests: got 0; allowed: 1 or more"),
        ({"seed": -1}, "workload_seed: got -1"),
        ({"max_tokens": -1}, "workload_max_tokens: got -1"),
        ({"too_long": "drop"}, "too_long: got 'drop'; allowed: refuse, cut"),
        ({"length_scale": float("inf")}, "length_scale: got inf"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkloadConfig(**settings)


def test_flags_say_it_all() -> None:
    names = [flag.name for flag in flag_table.WORKLOAD.flags]
    arguments = ["--workload=mix", "--workload_options=parts=chat rate=2,5"[:-2], "--rate=3"]
    settings = flags.parse((flag_table.WORKLOAD,), arguments, environment={}, known=names)
    config = settings.record(WorkloadConfig)
    assert config == WorkloadConfig(
        workload="mix", workload_options=("parts=chat rate=2",), rate=3.0
    )
    paths = {flag.path for flag in flag_table.WORKLOAD.flags}
    assert paths == set(WorkloadConfig.__dataclass_fields__)


def test_workloads_load_no_jax() -> None:
    code = "import jaxserve.workload.load, sys; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
