"""The report as one HTML file that needs nothing else: no network, no font, no library.

Tables are written here; plots are drawn in the browser by `page.js`, from data in the page, so that
they fit its width and its light or dark colours.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from jaxserve.report import plots
from jaxserve.report.compare import BETTER, SAME, WORSE, Comparison
from jaxserve.report.definitions import (
    CLIENT_COLUMNS,
    DISTRIBUTIONS,
    METRICS,
    NUMBERS,
    PERCENTILES,
    REPLICA_COLUMNS,
    STATISTICS,
    Column,
)
from jaxserve.report.report import Cell, Report
from jaxserve.report.text import NOTHING, shown, statistic

MOST_ROWS: Final = 100
"""Clients and replicas in a table."""
_HERE: Final = Path(__file__).parent
# The browser itself then refuses whatever the page might fetch.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_BARS: Final = frozenset({"service", "service_uncached", "busy"})
_MARKS: Final = {BETTER: "▲", WORSE: "▼", SAME: ""}


def report_page(report: Report) -> str:
    """The page of one run."""
    drawn = _Plots()
    sections = [
        ("latency", "Latency", drawn.grid(plots.latency_plots(report)) + _latency_table(report)),
        ("load", "Load over time", drawn.grid(plots.time_plots(report))),
        (
            "clients",
            "Clients",
            drawn.grid(plots.client_plots(report))
            + _rows_table("Clients", CLIENT_COLUMNS, report.clients, by="service"),
        ),
        (
            "replicas",
            "Replicas",
            drawn.grid(plots.replica_plots(report))
            + _rows_table("Replicas", REPLICA_COLUMNS, report.replicas, by=""),
        ),
        ("numbers", "All numbers", _numbers_tables(report)),
        ("setup", "Set-up", _setup(report)),
        ("definitions", "Definitions", _definitions()),
    ]
    if report.against is not None:
        sections.insert(1, ("errors", "Live and simulated", _errors(report.against)))
    lede = " · ".join(
        filter(
            None,
            [
                _workload(report),
                f"measured from {report.measured['window']}",
                report.measured["which is"],
            ],
        )
    )
    return _page(
        f"{report.title}",
        kind=f"jaxserve report · {report.about.kind} run",
        lede=lede,
        top=_tiles(report),
        sections=sections,
        drawn=drawn,
    )


def comparison_page(comparison: Comparison) -> str:
    """The page of several runs."""
    drawn = _Plots()
    first = comparison.names[0]
    sections = [
        ("plots", "Side by side", drawn.grid(plots.comparison_plots(comparison))),
        ("numbers", "Numbers", _comparison_table(comparison)),
        ("setup", "Set differently", _differing(comparison)),
        ("definitions", "Definitions", _definitions()),
    ]
    return _page(
        " · ".join(comparison.names),
        kind=f"jaxserve report · {len(comparison.names)} runs",
        lede=f"{_workload(comparison.reports[0])} · ratios are to {first}".lstrip(" ·"),
        top="",
        sections=sections,
        drawn=drawn,
    )


class _Plots:
    """Collects the plots of a page and gives each its place."""

    def __init__(self) -> None:
        self.data: dict[str, plots.Plot] = {}

    def grid(self, chosen: Sequence[plots.Plot]) -> str:
        if not chosen:
            return ""
        return f'<div class="plots">{"".join(map(self._figure, chosen))}</div>'

    def _figure(self, plot: plots.Plot) -> str:
        name = f"plot{len(self.data)}"
        self.data[name] = plot
        legend = plot.get("legend")
        if legend is None and len(plot.get("series", ())) > 1:
            legend = [
                [line["name"], line["color"], "dash" if line["dash"] else ""]
                for line in plot["series"]
            ]
        note = f"<small>{escape(plot['note'])}</small>" if plot["note"] else ""
        return (
            f'<figure class="{plot["wide"]}"><figcaption>{escape(plot["caption"])}{note}'
            f'</figcaption>{_legend(legend or [])}<div class="plot" id="{name}"></div></figure>'
        )


def _legend(entries: Sequence[Sequence[Any]]) -> str:
    if not entries:
        return ""
    items = (
        f'<li><i class="{kind}" style="color:var(--c{(color - 1) % 8 + 1})"></i>{escape(name)}</li>'
        for name, color, kind in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _page(
    title: str,
    *,
    kind: str,
    lede: str,
    top: str,
    sections: Iterable[tuple[str, str, str]],
    drawn: _Plots,
) -> str:
    sections = [each for each in sections if each[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{text}</section>'
        for name, heading, text in sections
    )
    # "<" could end the script element from within a client's name.
    data = json.dumps(drawn.data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{(_HERE / "page.css").read_text()}</style>
</head>
<body>
<div class="page">
<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1><p class="lede">{escape(lede)}</p>
<nav aria-label="Sections">{links}</nav></header>
<main>{top}<noscript><p class="note">The plots need JavaScript; the tables do not.</p></noscript>
{body}</main>
<footer>One file, nothing fetched. Point at a plot, or focus it and use the arrow keys, for its
values.</footer>
</div>
<script type="application/json" id="data">{data}</script>
<script>
{(_HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def _workload(report: Report) -> str:
    return report.about.workload.get("name", "")


def _tiles(report: Report) -> str:
    def percentiles(name: str) -> tuple[str, str] | None:
        known = report.distributions.get(name)
        if known is None:
            return None
        middle, tail = (shown(known.statistics[each], "s") for each in ("p50", "p99"))
        return middle, f"median; P99 {tail}"

    def number(name: str, more: str) -> tuple[str, str] | None:
        value = report.numbers.get(name)
        return None if value is None else (shown(value, METRICS[name].unit), more)

    def of(name: str, before: str) -> str:
        value = report.numbers.get(name)
        return "" if value is None else before.format(shown(value, METRICS[name].unit))

    failed = sum(int(report.numbers.get(name) or 0) for name in ("errors", "refused", "deadline"))
    fair = number("jain_backlogged", of("jain_backlogged_clients", "of {} clients that wait"))
    tiles = {
        "TTFT": percentiles("ttft_s"),
        "TPOT": percentiles("tpot_s"),
        "E2E": percentiles("e2e_s"),
        "Output": number("output_tokens_per_s", of("input_tokens_per_s", "tokens; input {}")),
        "Requests": number(
            "requests_per_s",
            of("completed", "completed; {} in all") + (f", {failed:,} failed" if failed else ""),
        ),
        "Goodput": number("goodput_share", of("goodput_per_s", "{} within the limits")),
        "Prefix hit rate": number("hit_rate", "of prompt tokens"),
        "Jain, service": fair
        or number("jain_service", of("jain_service_clients", "of {} clients with demand")),
        "Service gap": number("gap_over_bound", "of what the order promises, at most"),
        "Busy": number("utilisation", of("replicas", "of {} replicas' time")),
    }
    cells = (
        f'<div><dt>{name}</dt><dd>{tile[0]} <div class="more">{escape(tile[1])}</div></dd></div>'
        for name, tile in tiles.items()
        if tile is not None
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _latency_table(report: Report) -> str:
    rows = []
    for metric in DISTRIBUTIONS:
        known = report.distributions.get(metric.name)
        if known is None:
            continue
        cells = [shown(known.statistics[name], metric.unit) for name in STATISTICS]
        rows.append((_defined(metric.title, metric.definition), [*cells, f"{known.num:,}"]))
    return _table("Latency", ["", *map(statistic, STATISTICS), "values"], rows)


def _numbers_tables(report: Report) -> str:
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for metric in NUMBERS:
        value = report.numbers.get(metric.name)
        if value is not None:
            row = (_defined(metric.title, metric.definition), [shown(value, metric.unit)])
            groups.setdefault(metric.group, []).append(row)
    tables = (_table(group.capitalize(), [], rows) for group, rows in groups.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    return f'<div class="facts">{"".join(tables)}</div>{notes}'


def _rows_table(
    title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]], *, by: str
) -> str:
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


def _comparison_table(comparison: Comparison) -> str:
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


def _differing(comparison: Comparison) -> str:
    if not comparison.differing:
        return '<p class="note">Nothing: the runs were set alike.</p>'
    rows = [
        (escape(name), [escape(value) for value in values])
        for name, values in comparison.differing.items()
    ]
    return _table("Settings", ["", *comparison.names], rows, words=True)


def _errors(against: Mapping[str, Any]) -> str:
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


def _setup(report: Report) -> str:
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


def _definitions() -> str:
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
