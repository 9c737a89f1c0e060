"""The report as tables in a terminal; where that is a file or a pipe, as the same in plain text."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

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
from jaxserve.report.text import shown, statistic

PLAIN_WIDTH: Final = 120
MOST_ROWS: Final = 12
"""Clients and replicas in a table; a file has all."""
MOST_NAME: Final = 24
"""Letters of a name."""
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


def make_console() -> Console:
    """Of stdout: a terminal's colours and width, or plain text of `PLAIN_WIDTH`."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(width=PLAIN_WIDTH, force_terminal=False, no_color=True, highlight=False)


def show(report: Report) -> None:
    """Print latencies, numbers, clients and replicas."""
    console = make_console()
    console.print(Text(f"{report.title} ({report.about.kind})", style="bold"))
    for name, text in report.measured.items():
        console.print(Text(f"  {name}: {text}", style="dim"))
    console.print(_latencies(report))
    console.print(_numbers(report))
    if len(report.clients) > 1:
        most = sorted(report.clients, key=lambda row: -_number(row["service"]))
        console.print(_rows("clients", CLIENT_COLUMNS, _CLIENTS, most, width=console.width))
    if len(report.replicas) > 1:
        busiest = sorted(report.replicas, key=lambda row: -_number(row["busy"]))
        shown_rows = report.replicas if len(busiest) <= MOST_ROWS else busiest
        console.print(
            _rows("replicas", REPLICA_COLUMNS, _REPLICAS, shown_rows, width=console.width)
        )
    if report.against is not None:
        console.print(errors_table(report.against["errors"]))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))


def _number(value: Cell) -> float:
    return value if isinstance(value, int | float) else 0.0


def table_of(title: str, columns: Iterable[str], *, words: bool = False) -> Table:
    """A table whose first column is words and whose other ones are numbers, or `words` too."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for place, name in enumerate(columns):
        justify = "right" if place and not words else "left"
        table.add_column(name, justify=justify, no_wrap=not words or not place)
    return table


def _latencies(report: Report) -> Table:
    table = table_of("latency", ("", *map(statistic, STATISTICS), "of"))
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
    *,
    width: int,
) -> Table:
    """The first rows, and as many of the columns as find room."""
    by_name = {column.name: column for column in columns}
    more = f", the first {MOST_ROWS} of {len(rows)}" if len(rows) > MOST_ROWS else ""
    lines: list[list[str]] = [[]]
    for name in names:
        if all(row[name] is None for row in rows):
            continue
        column = by_name[name]
        cells = [shown(row[name], column.unit)[:MOST_NAME] for row in rows[:MOST_ROWS]]
        width -= 2 + max(map(len, (column.title, *cells)))
        if width < 2:
            break
        lines[0].append(column.title)
        lines[1:] = [
            [*line, cell] for line, cell in zip(lines[1:] or [[]] * len(cells), cells, strict=True)
        ]
    table = table_of(title + more, lines[0])
    for line in lines[1:]:
        table.add_row(*line)
    return table


def errors_table(errors: Sequence[Mapping[str, Any]]) -> Table:
    """Live beside simulated, as `errors.py` compares them."""
    table = table_of("live and simulated", ("", "live", "simulated", "error", "bound", ""))
    for row in errors:
        metric = METRICS[row["name"].partition(".")[0]]
        table.add_row(
            f"{metric.title} {statistic(row['name'].partition('.')[2])}".strip(),
            shown(row["live"], metric.unit),
            shown(row["simulated"], metric.unit),
            row["error_text"],
            row["bound_text"],
            {True: "within", False: Text("beyond", style="bold"), None: ""}[row["within"]],
        )
    return table
