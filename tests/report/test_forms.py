"""A report in its forms: JSON that reads back, a page that needs nothing else, CSV, a trace."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxserve import flag_table
from jaxserve.errors import ConfigError
from jaxserve.report.config import OutputConfig
from jaxserve.report.console import show
from jaxserve.report.definitions import CLIENT_COLUMNS, METRICS, REPLICA_COLUMNS
from jaxserve.report.export import chrome_trace, clients_csv, rows_csv
from jaxserve.report.html import report_page
from jaxserve.report.measure import measure
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import About, from_json, read_report, to_json
from jaxserve.report.text import shown
from jaxserve.report.write import check_files, write_report
from jaxserve.workload.work import Work

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in the order it was opened."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.data = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            assert values["id"] not in self.ids
            self.ids.add(values["id"])
        if "href" in values:
            self.links.append(values["href"])
        self.fetched += [value for name, value in attrs if name in ("src", "srcset", "data")]
        self.in_data = values.get("id") == "data"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and self.in_data:
            self.data += data


def test_json_reads_back_the_same(report):
    assert from_json(to_json(report)) == replace(report, slices=None)
    short = from_json(to_json(report, rows=False))
    assert short.rows is None and short.numbers == report.numbers
    whole = json.loads(to_json(report))
    assert whole["schema"] == "jaxserve.report/1"
    assert set(METRICS) < set(whole["definitions"])
    assert len(whole["rows"]["number"]) == 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; allowed: a report's JSON file"),
        ("{", "not JSON"),
        ("[1]", "got schema None; allowed: 'jaxserve.report/1'"),
        ('{"schema": "jaxserve.report/9"}', "got schema 'jaxserve.report/9'"),
        ('{"schema": "jaxserve.report/1"}', "a damaged report"),
        ('{"schema": "jaxserve.report/1", "about": 3}', "a damaged report"),
    ],
)
def test_files_that_are_no_reports_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"run.json: .*{re.escape(message)}") as caught:
        read_report(str(path))
    assert "\n" not in str(caught.value)


def test_the_page_is_whole_and_needs_nothing_else(report):
    text = report_page(report)
    page = Page(text)
    assert not page.fetched and all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= page.ids
    outside = re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<]*|url\(|@import|fetch\(", text)
    assert [it for it in outside if it.startswith(("http", "url", "@", "fetch"))] == [
        "http://www.w3.org/2000/svg"  # a name, which nobody looks up
    ]
    plots = json.loads(page.data)
    assert set(plots) <= page.ids and len(plots) >= 14
    assert all(plot["summary"] and plot["caption"] for plot in plots.values())
    assert {plot["type"] for plot in plots.values()} == {"line", "bars", "heat", "gantt", "ranges"}
    assert len(text) < 300_000
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text


def test_the_script_is_small():
    assert (ROOT / "jaxserve/report/page.js").stat().st_size < 20_000


def test_names_of_clients_stay_text(report):
    evil = "</script><script>alert(1)</script>"
    clients = tuple(dict(row, client=evil) for row in report.clients)
    text = report_page(replace(report, clients=clients, about=About(kind="live", title=evil)))
    Page(text)
    assert "<script>alert" not in text


def test_an_empty_run_has_a_page_and_tables(capsys):
    report = measure(Recorder(), About(kind="live"))
    Page(report_page(report))
    show(report)
    assert "Requests" in capsys.readouterr().out
    assert from_json(to_json(report)).numbers == report.numbers
    assert json.loads(chrome_trace(report))["traceEvents"] == []


def test_a_run_that_refuses_at_once_has_a_page():
    recorder = Recorder()
    for number, client in enumerate("ab"):
        work = Work(
            number=number,
            arrival_s=0.0,
            prompt_tokens=1,
            output_tokens=1,
            max_tokens=1,
            client=client,
        )
        recorder.sent(work, 0.0)
        recorder.ended(number, 0.0, "refused", 0)
    report = measure(recorder, About(kind="live"))
    Page(report_page(report))
    assert report.numbers["refused"] == 2 and report.numbers["jain_service"] is None


def test_tables_of_csv(report):
    rows = list(csv.DictReader(io.StringIO(rows_csv(report))))
    assert len(rows) == 600 and rows[0]["reason"] == "length" and rows[0]["cached_tokens"] == "4"
    assert float(rows[5]["ttft_s"]) == pytest.approx(
        float(rows[5]["first_s"]) - float(rows[5]["sent_s"]), abs=1e-6
    )
    clients = list(csv.DictReader(io.StringIO(clients_csv(report))))
    assert [row["client"] for row in clients] == [f"client {place}" for place in range(4)]
    assert rows_csv(replace(report, rows=None)) == "number\n"


def test_the_chrome_trace_has_every_slice(report):
    events = json.loads(chrome_trace(report))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == report.numbers["slices"]
    assert {event["pid"] for event in slices} == {0, 1, 2}
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["replica 0", "replica 1", "replica 2"]
    first = slices[0]
    assert first["dur"] == pytest.approx(80_000) and first["args"]["steps"] == 8
    assert sum(event["ph"] == "C" for event in events) == len(slices)


def test_slices_beyond_the_bound_are_cut_and_the_report_says_so():
    recorder = Recorder(keep_slices=2, keep_rows=False)
    for at in range(3):
        recorder.slice(0, float(at), at + 0.5, steps=1, rows=1, prefill_tokens=0, output_tokens=1)
    report = measure(recorder, About(kind="simulated"))
    assert report.slices is not None and len(report.slices["replica"]) == 2
    assert report.rows is None and report.numbers["slices"] == 3
    assert any(note.startswith("The first 2 of 3 slices are kept") for note in report.notes)


def test_a_pipe_gets_plain_text_that_is_always_the_same(report, capsys):
    show(report)
    first = capsys.readouterr().out
    show(report)
    second = capsys.readouterr().out
    assert first == second and "\x1b" not in first
    assert all(len(line) <= 120 for line in first.splitlines())
    assert "client 3" in first and "TTFT" in first and "(E2E - TTFT) / (output tokens - 1)" in first


def test_everything_asked_for_is_written(report, tmp_path, capsys):
    paths = {name: str(tmp_path / name) for name in OutputConfig().files}
    lines: list[str] = []
    output = OutputConfig(**paths)
    check_files(output)
    write_report(report, output, lines.append)
    assert len(lines) == 5 and all(Path(path).stat().st_size for path in paths.values())
    assert read_report(paths["json"]).numbers == report.numbers
    assert "TTFT" in capsys.readouterr().out
    missing = OutputConfig(html=str(tmp_path / "no" / "a.html"))
    with pytest.raises(ConfigError, match="html: got .*allowed: a file in a directory that exists"):
        check_files(missing)
    with pytest.raises(ConfigError, match="html: .*No such file"):
        write_report(report, missing, lines.append)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slo_ttft_ms": 0.0}, "slo_ttft_ms: got 0.0; allowed: a positive number"),
        ({"warmup_s": -1.0}, "warmup_s: got -1.0"),
        ({"w_out": float("nan")}, "w_out: got nan"),
        ({"w_in": 0.0, "w_out": 0.0}, "w_out: got 0.0; allowed: positive where w_in is 0"),
        ({"json": "a", "html": "a"}, "got 'a' twice"),
    ],
)
def test_bad_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        OutputConfig(**values)


def test_every_option_has_a_flag_and_limits_are_seconds():
    fields = {flag.path for flag in flag_table.OUTPUT.flags}
    assert fields == set(OutputConfig.__dataclass_fields__)
    limits = OutputConfig(slo_ttft_ms=250.0, slo_e2e_s=3.0).measure_options.limits
    assert (limits.ttft_s, limits.tpot_s, limits.e2e_s) == (0.25, None, 3.0)


def test_the_page_of_definitions_says_what_the_report_says():
    text = (ROOT / "docs" / "report.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (.+) \|$", text, re.MULTILINE))
    wanted = {
        (metric.name, metric.title, metric.unit or "-", metric.definition)
        for metric in METRICS.values()
    }
    columns = {
        (column.name, column.title, column.unit or "-", column.definition)
        for column in (*CLIENT_COLUMNS, *REPLICA_COLUMNS)
    }
    assert rows == wanted | columns


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.01234, "s", "12.3 ms"),
        (3.2e-5, "s", "32.0 µs"),
        (75.4, "s", "75.4 s"),
        (0.9812, "share", "98.1 %"),
        (26647.9, "tokens/s", "26.6k/s"),
        (99_999, "tokens", "99,999"),
        (2_345_678, "tokens", "2.35M"),
        (None, "s", "-"),
        (0, "s", "0 s"),
    ],
)
def test_numbers_as_people_read_them(value, unit, text):
    assert shown(value, unit) == text
