"""The report as tables in a terminal; where that is a file or a pipe, as the same in plain text."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxserve.report.definitions import (
    CLIENT_COLUMNS,
    DISTRIBUTIONS,
    METRICS,
    NUMBERS,
    REPLICA_COLUMNS,
    STATISTICS,
    Column,
)
from jaxserve.report.report import Cell, Report
from jaxserve.report.text import shown

PLAIN_WIDTH: Final = 120
MOST_ROWS: Final = 12
"""Clients and replicas in a table; a file has all."""
_CLIENTS: Final = (
    "client",
    "weight",
    "requests",
    "failed",
    "service",
    "service_uncached",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "e2e_p99_s",
)
_REPLICAS: Final = (
    "replica",
    "slices",
    "busy",
    "slice_steps",
    "slice_rows",
    "prefill_tokens",
    "output_tokens",
    "preemptions",
    "gap",
    "bound",
)


def make_console(file: IO[str] | None = None) -> Console:
    """For a terminal with its colours and width; for anything else plain and `PLAIN_WIDTH` wide."""
    stream = sys.stdout if file is None else file
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(
        file=stream, width=PLAIN_WIDTH, force_terminal=False, no_color=True, highlight=False
    )


def show(report: Report, *, file: IO[str] | None = None) -> None:
    """Print latencies, numbers, clients and replicas."""
    console = make_console(file)
    console.print(Text(f"{report.title} ({report.about.kind})", style="bold"))
    for name, text in report.measured.items():
        console.print(Text(f"  {name}: {text}", style="dim"))
    console.print(_latencies(report))
    console.print(_numbers(report))
    if len(report.clients) > 1:
        most = sorted(report.clients, key=lambda row: -_number(row["service"]))
        console.print(_rows("clients", CLIENT_COLUMNS, _CLIENTS, most))
    if len(report.replicas) > 1:
        busiest = sorted(report.replicas, key=lambda row: -_number(row["busy"]))
        shown_rows = report.replicas if len(busiest) <= MOST_ROWS else busiest
        console.print(_rows("replicas", REPLICA_COLUMNS, _REPLICAS, shown_rows))
    if report.against is not None:
        console.print(errors_table(report.against["errors"]))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))


def _number(value: Cell) -> float:
    return value if isinstance(value, int | float) else 0.0


def table_of(title: str, columns: Iterable[str]) -> Table:
    """A table whose first column is words and whose other ones are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for place, name in enumerate(columns):
        table.add_column(
            name, justify="right" if place else "left", no_wrap=True, min_width=0 if place else 8
        )
    return table


def _latencies(report: Report) -> Table:
    table = table_of("latency", ("", *(name.upper() for name in STATISTICS), "of"))
    for metric in DISTRIBUTIONS:
        known = report.distributions.get(metric.name)
        if known is not None:
            values = (shown(known.statistics[name], metric.unit) for name in STATISTICS)
            table.add_row(metric.title, *values, f"{known.num:,}")
    return table


def _numbers(report: Report) -> Table:
    """Two pairs of name and value a line, group by group."""
    table = table_of("numbers", ("", "", "", ""))
    table.show_header = False
    table.columns[2].justify = "left"
    groups: dict[str, list[tuple[str, str]]] = {}
    for metric in NUMBERS:
        value = report.numbers.get(metric.name)
        if value is not None:
            pair = (metric.title, shown(value, metric.unit))
            groups.setdefault(metric.group, []).append(pair)
    for pairs in groups.values():
        for first, second in zip(pairs[::2], [*pairs[1::2], ("", "")], strict=False):
            table.add_row(*first, *second)
        table.add_section()
    return table


def _rows(
    title: str,
    columns: Sequence[Column],
    names: Sequence[str],
    rows: Sequence[Mapping[str, Cell]],
) -> Table:
    by_name = {column.name: column for column in columns}
    names = [name for name in names if any(row[name] is not None for row in rows)]
    more = f", the first {MOST_ROWS} of {len(rows)}" if len(rows) > MOST_ROWS else ""
    table = table_of(title + more, (by_name[name].title for name in names))
    for row in rows[:MOST_ROWS]:
        table.add_row(*(shown(row[name], by_name[name].unit) for name in names))
    return table


def errors_table(errors: Sequence[Mapping[str, Any]]) -> Table:
    """Live beside simulated, as `errors.py` compares them."""
    table = table_of("live and simulated", ("", "LIVE", "SIMULATED", "ERROR", "BOUND", ""))
    for row in errors:
        metric = METRICS[row["name"].partition(".")[0]]
        statistic = row["name"].partition(".")[2].upper()
        table.add_row(
            f"{metric.title} {statistic}".strip(),
            shown(row["live"], metric.unit),
            shown(row["simulated"], metric.unit),
            row["error_text"],
            row["bound_text"],
            {True: "within", False: Text("beyond", style="bold"), None: ""}[row["within"]],
        )
    return table
