"""The page's tables, as HTML. Knows no page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from jaxserve.report.compare import BETTER, SAME, WORSE, Comparison
from jaxserve.report.definitions import (
    DISTRIBUTIONS,
    METRICS,
    NUMBERS,
    PERCENTILES,
    STATISTICS,
    Column,
)
from jaxserve.report.report import Cell, Report
from jaxserve.report.text import NOTHING, shown, statistic

MOST_ROWS: Final = 100
"""Clients and replicas in a table."""
_BARS: Final = frozenset({"service", "service_uncached", "busy"})
_MARKS: Final = {BETTER: "▲", WORSE: "▼", SAME: ""}


def latency_table(report: Report) -> str:
    """A row for each metric that has a distribution."""
    rows = []
    for metric in DISTRIBUTIONS:
        known = report.distributions.get(metric.name)
        if known is None:
            continue
        cells = [shown(known.statistics[name], metric.unit) for name in STATISTICS]
        rows.append((_defined(metric.title, metric.definition), [*cells, f"{known.num:,}"]))
    return _table("Latency", ["", *map(statistic, STATISTICS), "values"], rows)


def numbers_tables(report: Report) -> str:
    """A table for each group of numbers, and the report's notes."""
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for metric in NUMBERS:
        value = report.numbers.get(metric.name)
        if value is not None:
            row = (_defined(metric.title, metric.definition), [shown(value, metric.unit)])
            groups.setdefault(metric.group, []).append(row)
    tables = (_table(group.capitalize(), [], rows) for group, rows in groups.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    return f'<div class="facts">{"".join(tables)}</div>{notes}'


def rows_table(
    title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]], *, by: str
) -> str:
    """Rows of clients or replicas, those with most of the column `by` first, if it is named."""
    if not rows:
        return ""
    shown_rows = sorted(rows, key=lambda row: -float(row[by] or 0)) if by else list(rows)
    columns = [column for column in columns if any(row[column.name] is not None for row in rows)]
    caption = title
    if len(rows) > MOST_ROWS:
        caption += f" <small>the first {MOST_ROWS} of {len(rows):,}; the CSV has all</small>"
    most = {
        column.name: 1.0
        if column.unit == "share"
        else max(float(row[column.name] or 0) for row in rows)
        for column in columns
        if column.name in _BARS
    }
    head = "".join(
        f'<th scope="col"><span title="{escape(column.definition)}">{escape(column.title)}</span>'
        "</th>"
        for column in columns
    )
    body = []
    for row in shown_rows[:MOST_ROWS]:
        first, *rest = columns
        name = escape(str(row[first.name]))
        cells = [f'<th scope="row">{name}</th>']
        for column in rest:
            part = most.get(column.name)
            value = row[column.name]
            share = 100 * float(value or 0) / part if part else 0.0
            bar = f' class="bar" style="--part:{share:.1f}%"' if part else ""
            cells.append(f"<td{bar}>{escape(shown(value, column.unit))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def comparison_table(comparison: Comparison) -> str:
    """All numbers of all runs, with ratios to the first."""
    first, *others = comparison.names
    head = ["", first, *(text for name in others for text in (name, "ratio"))]
    rows, group = [], None
    for line in comparison.lines:
        cells = [shown(line.values[0], line.metric.unit)]
        rest = zip(line.values[1:], line.ratios[1:], line.marks[1:], strict=True)
        for value, ratio, mark in rest:
            cells.append(shown(value, line.metric.unit))
            text = NOTHING if ratio is None else f"{ratio:.3g}×"
            cells.append(f'<span class="{mark}">{text} {_MARKS[mark]}</span>')
        begins = group is not None and group != line.metric.group
        group = line.metric.group
        rows.append((_defined(line.title, line.metric.definition), cells, begins))
    note = '<p class="note">▲ better than the first, ▼ worse, by more than 0.5 %.</p>'
    return _table("Numbers", head, rows) + note


def differing_table(comparison: Comparison) -> str:
    """What the runs were set to differently."""
    if not comparison.differing:
        return '<p class="note">Nothing: the runs were set alike.</p>'
    rows = [
        (escape(name), [escape(value) for value in values])
        for name, values in comparison.differing.items()
    ]
    return _table("Settings", ["", *comparison.names], rows, words=True)


def errors_table(against: Mapping[str, Any]) -> str:
    """Live beside simulated, as `errors.py` compares them."""
    rows = []
    for row in against["errors"]:
        metric = METRICS[row["name"].partition(".")[0]]
        title = f"{metric.title} {statistic(row['name'].partition('.')[2])}".strip()
        verdict = {
            True: '<span class="better">within</span>',
            False: '<span class="worse">beyond</span>',
            None: "",
        }[row["within"]]
        values = [shown(row[name], metric.unit) for name in ("live", "simulated")]
        rows.append(
            (
                _defined(title, metric.definition),
                [*values, escape(row["error_text"]), escape(row["bound_text"]), verdict],
            )
        )
    head = ["", "live", "simulated", "error", "bound", ""]
    return _table(f"Errors of the simulation: {against['title']}", head, rows)


def setup_tables(report: Report) -> str:
    """How the run was measured, and all that it takes to run it again."""
    about = report.about
    parts = {
        "Measured": report.measured,
        "Workload": about.workload,
        "Profile": about.profile,
        "Versions": about.versions,
        "Seeds": {name: str(seed) for name, seed in about.seeds.items()},
        "Configuration": about.configuration,
    }
    tables = (
        _table(
            title,
            [],
            [(escape(name), [escape(str(text))]) for name, text in part.items()],
            words=True,
        )
        for title, part in parts.items()
        if part
    )
    return f'<div class="facts">{"".join(tables)}</div>'


def definition_list() -> str:
    """What every number means."""
    entries = "".join(
        f"<div><dt>{escape(metric.title)}</dt><dd>{escape(metric.definition)}</dd></div>"
        for metric in METRICS.values()
    )
    more = f"<div><dt>Percentiles</dt><dd>{escape(PERCENTILES)}</dd></div>"
    return f'<dl class="definitions">{entries}{more}</dl>'


def _defined(title: str, definition: str) -> str:
    return f'<span title="{escape(definition)}">{escape(title)}</span>'


def _table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]] | tuple[str, Sequence[str], bool]],
    *,
    words: bool = False,
) -> str:
    """Rows of a heading and cells, both HTML; with a third entry True a group begins there."""
    kind = ' class="words"' if words else ""
    lines = []
    for heading, cells, *begins in rows:
        group = ' class="group"' if any(begins) else ""
        body = "".join(f"<td{kind}>{cell}</td>" for cell in cells)
        lines.append(f'<tr{group}><th scope="row">{heading}</th>{body}</tr>')
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>{thead}'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
