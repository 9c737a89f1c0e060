"""Runs side by side: ratios, what is better, what may be compared; live runs and simulations."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from jaxserve import launch
from jaxserve.errors import ConfigError
from jaxserve.report.compare import BETTER, SAME, WORSE, compare, show_comparison
from jaxserve.report.console import show
from jaxserve.report.errors import Bound, errors, side_by_side
from jaxserve.report.html import comparison_page, report_page
from jaxserve.report.report import from_json, to_json


def with_number(report, **numbers):
    return replace(report, numbers={**report.numbers, **numbers})


def of(comparison, name: str):
    return next(line for line in comparison.lines if line.metric.name == name)


def test_ratios_are_to_the_first_and_know_what_is_better(report):
    first = with_number(report, hit_rate=0.5, preemptions=10, refused=0)
    second = with_number(report, hit_rate=0.6, preemptions=12, refused=3)
    comparison = compare([first, second, first])
    hits = of(comparison, "hit_rate")
    assert hits.ratios == (1.0, pytest.approx(1.2), 1.0) and hits.marks == (SAME, BETTER, SAME)
    assert of(comparison, "preemptions").marks == (SAME, WORSE, SAME)
    refused = of(comparison, "refused")
    assert refused.ratios == (None, None, None) and refused.marks[1] == WORSE
    slightly = with_number(report, hit_rate=0.501)
    assert of(compare([first, slightly]), "hit_rate").marks[1] == SAME


def test_what_was_set_differently_is_listed(report, other):
    comparison = compare([report, other])
    assert comparison.names == ("fcfs", "other")
    assert comparison.differing["order"] == ("fcfs", "lpm")
    assert "measured: limits" not in comparison.differing
    assert compare([report, report]).names == ("run 1", "run 2")


def test_other_workloads_are_refused_unless_wanted(report, other):
    elsewhere = replace(other, about=replace(other.about, workload={"name": "azure"}))
    with pytest.raises(ConfigError, match="b.json has another workload .*--different_workloads"):
        compare([report, elsewhere], paths=["a.json", "b.json"])
    both = compare([report, elsewhere], different_workloads=True)
    assert both.differing["workload name"] == ("queue", "azure")


def test_a_comparison_is_shown(report, other, capsys):
    show_comparison(compare([report, other]))
    printed = capsys.readouterr().out
    assert "order" in printed and "ratios to fcfs" in printed
    text = comparison_page(compare([report, other] * 4))
    HTMLParser().feed(text)
    data = text.split('id="data">')[1].split("</script>")[0]
    assert len(json.loads(data)["plot0"]["series"]) == 8
    assert len(text) < 500_000


def test_errors_of_a_simulation_are_held_to_bounds(report):
    live = with_number(report, hit_rate=0.50, requests_per_s=100.0, jain_service=0.0)
    simulated = with_number(report, hit_rate=0.52, requests_per_s=104.0, jain_service=0.01)
    bounds = {
        "hit_rate": Bound(absolute=0.01),
        "requests_per_s": Bound(relative=0.03),
        "jain_service": Bound(absolute=0.02),
        "ttft_s.mean": Bound(relative=0.05),
    }
    found = {row.name: row for row in errors(live, simulated, bounds=bounds)}
    assert found["requests_per_s"].relative == 0.04 and found["requests_per_s"].within is False
    assert found["hit_rate"].within is False and found["hit_rate"].error_text == "+0.02"
    assert found["jain_service"].within is True and found["jain_service"].relative is None
    assert found["ttft_s.mean"].within is True and found["ttft_s.mean"].error_text == "+0.0 %"
    assert found["e2e_s.mean"].within is None
    # live runs that are 4 apart allow 6
    repeated = with_number(live, requests_per_s=96.0)
    again = errors(live, simulated, bounds=bounds, repeated=repeated)
    row = next(row for row in again if row.name == "requests_per_s")
    assert row.within is True and row.bound_text == "1.5 x live runs' difference"
    # of several draws the mean counts
    draws = [with_number(simulated, requests_per_s=each) for each in (101.0, 101.0)]
    mean = errors(live, simulated, bounds=bounds, draws=draws)
    row = next(row for row in mean if row.name == "requests_per_s")
    assert row.within is True and row.simulated == 102.0


def test_a_live_run_and_its_simulation_are_one_report(report, other, capsys):
    live = replace(report, about=replace(report.about, kind="live"))
    both = side_by_side(live, other)
    assert both.numbers == live.numbers
    assert from_json(to_json(both)).against == json.loads(json.dumps(both.against))
    page = report_page(both)
    assert "Errors of the simulation: other" in page and '"simulated"' in page
    show(both)
    assert "live and simulated" in capsys.readouterr().out


def test_the_command_compares_and_shows_again(report, other, tmp_path, capsys):
    names = []
    for name, each in (("a", report), ("b", other)):
        names.append(str(tmp_path / f"{name}.json"))
        (tmp_path / f"{name}.json").write_text(to_json(each))
    page = tmp_path / "both.html"
    given = [f"--compare={name}" for name in names]
    assert launch.main(["report", *given, f"--html={page}"]) == 0
    assert "ratios to fcfs" in capsys.readouterr().out and page.stat().st_size
    assert launch.main(["report", given[0], f"--html={page}"]) == 0
    assert "fcfs (simulated)" in capsys.readouterr().out
    for wrong in ([], given * 5, ["--compare=no.json"], [*given, f"--html={tmp_path}/no/a.html"]):
        assert launch.main(["report", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
