"""The report as files for other programs: CSV and the Chrome trace. Measures nothing."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxserve.report.definitions import CLIENT_COLUMNS
from jaxserve.report.report import Report


def rows_csv(report: Report) -> str:
    """A line for each request; only the names of the columns if the report has no rows."""
    rows = report.rows or {"number": []}
    return _csv(list(rows), zip(*rows.values(), strict=True))


def clients_csv(report: Report) -> str:
    """A line for each client."""
    names = [column.name for column in CLIENT_COLUMNS]
    return _csv(names, ([client[name] for name in names] for client in report.clients))


def _csv(names: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()


def chrome_trace(report: Report) -> str:
    """Slices as trace events, for Perfetto or chrome://tracing: a process for each replica, a
    counter for its rows. Times are microseconds from the run's start."""
    events = list(_events(report.slices or {"replica": []}))
    whole = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"title": report.title, **report.about.versions},
    }
    return json.dumps(whole, separators=(",", ":"), allow_nan=False)


def _events(slices: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for replica in sorted({int(place) for place in slices["replica"]}):
        for kind, name in (("process_name", f"replica {replica}"), ("thread_name", "device")):
            yield {"ph": "M", "pid": replica, "tid": 0, "name": kind, "args": {"name": name}}
    names = list(slices)
    for row in zip(*slices.values(), strict=True):
        values = dict(zip(names, row, strict=True))
        replica = int(values.pop("replica"))
        begin_us = 1e6 * values.pop("begin_s")
        length_us = 1e6 * values.pop("end_s") - begin_us
        args = {name: int(value) for name, value in values.items()}
        kind = "prefill" if args["prefill_tokens"] else "decode"
        common = {"pid": replica, "tid": 0, "ts": round(begin_us, 3)}
        yield {
            **common,
            "ph": "X",
            "name": f"{kind}, {args['steps']} steps",
            "cat": kind,
            "dur": round(length_us, 3),
            "args": args,
        }
        yield {**common, "ph": "C", "name": "rows", "args": {"rows": args["rows"]}}
