"""The report as one HTML file that needs nothing else: no network, no font, no library.

Plots are drawn in the browser by `page.js`, from data in the page, so that they fit its width and
its light or dark colours.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from jaxserve.report import plots
from jaxserve.report.compare import Comparison
from jaxserve.report.definitions import (
    CLIENT_COLUMNS,
    METRICS,
    REPLICA_COLUMNS,
)
from jaxserve.report.html_tables import (
    comparison_table,
    definition_list,
    differing_table,
    errors_table,
    latency_table,
    numbers_tables,
    rows_table,
    setup_tables,
)
from jaxserve.report.report import Report
from jaxserve.report.text import shown

_HERE: Final = Path(__file__).parent
# The browser itself then refuses whatever the page might fetch.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def report_page(report: Report) -> str:
    """The page of one run."""
    drawn = _Plots()
    sections = [
        ("latency", "Latency", drawn.grid(plots.latency_plots(report)) + latency_table(report)),
        ("load", "Load over time", drawn.grid(plots.time_plots(report))),
        (
            "clients",
            "Clients",
            drawn.grid(plots.client_plots(report))
            + rows_table("Clients", CLIENT_COLUMNS, report.clients, by="service"),
        ),
        (
            "replicas",
            "Replicas",
            drawn.grid(plots.replica_plots(report))
            + rows_table("Replicas", REPLICA_COLUMNS, report.replicas, by=""),
        ),
        ("numbers", "All numbers", numbers_tables(report)),
        ("setup", "Set-up", setup_tables(report)),
        ("definitions", "Definitions", definition_list()),
    ]
    if report.against is not None:
        sections.insert(1, ("errors", "Live and simulated", errors_table(report.against)))
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
        ("numbers", "Numbers", comparison_table(comparison)),
        ("setup", "Set differently", differing_table(comparison)),
        ("definitions", "Definitions", definition_list()),
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
