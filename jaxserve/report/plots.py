"""The plots of the page, as plain data for `page.js`: what is drawn, its units, its words. Draws
nothing and knows no HTML.

A plot is a dict: its `type`, `caption`, `note` and `summary` (for who cannot see it), `wide` (how
much of a line it takes), and what its type needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from jaxserve.report.compare import Comparison
from jaxserve.report.definitions import METRICS
from jaxserve.report.report import QUANTILES, Number, Report
from jaxserve.report.text import shown

Plot = dict[str, Any]
MOST_RANGES: Final = 24
"""Clients in the plot of latencies by client."""
_LIMITS: Final = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
_TIME: Final = {"unit": "time"}
_OUTSIDE: Final = "Shaded: outside of the steady window."


def latency_plots(report: Report) -> list[Plot]:
    """How many requests were how fast."""
    plots = [_cdf(report, name) for name in _LIMITS if name in report.distributions]
    against = report.against or {}
    for plot in plots:
        curve = against.get("curves", {}).get(plot["metric"])
        if curve is not None:
            plot["series"][0]["name"] = "live"
            plot["series"].append(_line("simulated", 2, curve, QUANTILES, dash=True))
    gaps = report.series.get("delivery_gap_s")
    if gaps is not None:
        known = (
            report.distributions["delivery_gap_s"].statistics
            if ("delivery_gap_s" in report.distributions)
            else None
        )
        summary = (
            ""
            if known is None
            else f"half within {shown(known['p50'], 's')}, 99 % within {shown(known['p99'], 's')}"
        )
        plots.append(
            _bars(
                gaps,
                "Delivery gap",
                "Time between two messages of a request, in the whole run.",
                summary=f"Histogram of delivery gaps: {summary}.",
                counted="gaps",
            )
        )
    return plots


def time_plots(report: Report) -> list[Plot]:
    """Load and tokens over the run."""
    line = report.series.get("timeline")
    if line is None:
        return []
    window = report.series["window"]
    peak = max(a + b for a, b in zip(line["waiting"], line["streaming"], strict=True))
    most = max(line["output"])
    throughput = [_line("output", 1, line["t"], line["output"])]
    throughput.append(_line("input", 2, line["t"], line["input"]))
    simulated = (report.against or {}).get("timeline")
    if simulated is not None:
        throughput[0]["name"] = "output, live"
        throughput[1] = _line(
            "output, simulated", 2, simulated["t"], simulated["output"], dash=True
        )
    return [
        {
            "type": "line",
            "wide": "half",
            "stack": True,
            "caption": "Requests in the system",
            "note": f"With a first token, and still without one. {_OUTSIDE}",
            "summary": f"Requests in the system over time, at most {peak:.0f}.",
            "x": _TIME,
            "y": {"unit": ""},
            "window": window,
            "series": [
                _line("no token yet", 2, line["t"], line["waiting"]),
                _line("streaming", 1, line["t"], line["streaming"]),
            ],
        },
        {
            "type": "line",
            "wide": "half",
            "caption": "Tokens per second",
            "note": f"Input counts when the first token comes, cached ones too. {_OUTSIDE}",
            "summary": f"Tokens per second over time; output at most {shown(most, 'tokens/s')}.",
            "x": _TIME,
            "y": {"unit": ""},
            "window": window,
            "series": throughput,
        },
        {
            "type": "line",
            "stack": True,
            "wide": "full",
            "height": 150,
            "caption": "Requests sent per second",
            "note": "",
            "summary": f"Requests sent per second, at most {max(line['arrivals']):.3g}.",
            "x": _TIME,
            "y": {"unit": ""},
            "window": window,
            "series": [_line("sent", 3, line["t"], line["arrivals"])],
        },
    ]


def client_plots(report: Report) -> list[Plot]:
    """Who was served how much, how far apart they were, and how long they waited."""
    plots = []
    curves = report.series.get("clients")
    if curves is not None:
        for name, caption, note in (
            ("all", "Service by client, all tokens", "Priced tokens by weight since the start."),
            (
                "uncached",
                "Service by client, cached tokens free",
                "The same without what the prefix cache had.",
            ),
        ):
            lines = zip(curves["names"], curves[name], strict=True)
            series = [
                _line(client, place + 1, curves["t"], values)
                for place, (client, values) in enumerate(lines)
            ]
            most = max(
                curves["names"], key=lambda each: curves[name][curves["names"].index(each)][-1]
            )
            plots.append(
                {
                    "type": "line",
                    "wide": "half",
                    "ends": True,
                    "height": 270,
                    "caption": caption,
                    "note": note,
                    "summary": f"{caption}, cumulative over time; most for {most}.",
                    "x": _TIME,
                    "y": {"unit": ""},
                    "window": report.series["window"],
                    "series": series,
                }
            )
    gap = report.series.get("gap")
    ranges = _ranges(report)
    if gap is not None:
        plots.append(_gap(report, gap, wide="half" if ranges else "full"))
    return plots + ranges


def replica_plots(report: Report) -> list[Plot]:
    """What the devices did."""
    plots = []
    busy = report.series.get("busy")
    if busy is not None:
        plots.append(
            {
                "type": "heat",
                "wide": "full",
                "caption": "Busy replicas",
                "note": "Share of time in which each replica ran a slice: the darker the busier.",
                "summary": f"Heat strip of {len(busy['names'])} rows of replicas over time, busy"
                f" {shown(report.numbers.get('utilisation'), 'share')} on average.",
                **busy,
            }
        )
    gantt = report.series.get("gantt")
    if gantt is not None:
        plots.append(
            {
                "type": "gantt",
                "wide": "full",
                "caption": "The first slices, one by one",
                "note": "A lane for each replica; the stronger the colour, the more rows.",
                "summary": "The first slices of each replica as bars over time.",
                "legend": [["decode alone", 1, "box"], ["with prefill", 2, "box"]],
                **gantt,
            }
        )
    for name, caption, note, even in (
        ("slice_s", "Slice time", "Time of a slice on its device.", False),
        ("slice_steps", "Slice length", "Decode steps of a slice.", True),
    ):
        bars = report.series.get(name)
        if bars is not None:
            plots.append(
                _bars(bars, caption, note, summary=f"Histogram: {caption}.", counted="slices")
            )
            plots[-1]["x"]["even"] = even
            plots[-1]["what"] = "steps" if even else ""
    return plots


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """All runs in the same plots."""
    plots = []
    for name in (*_LIMITS, "delivery_gap_s"):
        lines = [
            _line(title, place + 1, report.distributions[name].curve, QUANTILES)
            for place, (title, report) in enumerate(
                zip(comparison.names, comparison.reports, strict=True)
            )
            if name in report.distributions
        ]
        if lines:
            plots.append(_cdf_of(name, lines, f"{METRICS[name].title} of {len(lines)} runs"))
    for name, caption in (("output", "Output tokens per second"), ("waiting", "No token yet")):
        lines = [
            _line(title, place + 1, report.series["timeline"]["t"], report.series["timeline"][name])
            for place, (title, report) in enumerate(
                zip(comparison.names, comparison.reports, strict=True)
            )
            if "timeline" in report.series
        ]
        if lines:
            plots.append(
                {
                    "type": "line",
                    "wide": "half",
                    "caption": caption,
                    "note": "" if name == "output" else "Requests that wait for their first token.",
                    "summary": f"{caption} of {len(lines)} runs over time.",
                    "x": _TIME,
                    "y": {"unit": ""},
                    "series": lines,
                }
            )
    return plots


def _line(
    name: str,
    color: int,
    x: Sequence[Number],
    y: Sequence[Number],
    *,
    dash: bool = False,
) -> dict[str, Any]:
    return {"name": name, "color": color, "x": list(x), "y": list(y), "dash": dash}


def _cdf_of(name: str, lines: list[dict[str, Any]], summary: str) -> Plot:
    metric = METRICS[name]
    return {
        "type": "line",
        "metric": name,
        "wide": "half",
        "cdf": True,
        "caption": metric.title,
        "note": "Share of requests that were at most so slow."
        if name != "delivery_gap_s"
        else "Share of gaps that were at most so long.",
        "summary": summary,
        "x": {"unit": "s", "log": True},
        "y": {"unit": "share", "max": 1},
        "series": lines,
    }


def _cdf(report: Report, name: str) -> Plot:
    known = report.distributions[name]
    title = METRICS[name].title
    plot = _cdf_of(
        name,
        [_line(title, 1, known.curve, QUANTILES)],
        f"{title}: half within {shown(known.statistics['p50'], 's')}, 99 % within"
        f" {shown(known.statistics['p99'], 's')}.",
    )
    plot["points"] = [
        {
            "x": known.statistics[f"p{percent}"],
            "y": percent / 100,
            "label": f"P{percent} {shown(known.statistics[f'p{percent}'], 's')}",
        }
        for percent in (50, 90, 99)
    ]
    limit = report.series.get("limits", {}).get(name)
    if limit is not None:
        plot["refs"] = [{"x": limit, "label": f"limit {shown(limit, 's')}"}]
    return plot


def _bars(
    series: Mapping[str, Any], caption: str, note: str, *, summary: str, counted: str
) -> Plot:
    return {
        "type": "bars",
        "wide": "half",
        "caption": caption,
        "note": note,
        "summary": summary,
        "counted": counted,
        "x": {"unit": "s"},
        **series,
    }


def _gap(report: Report, gap: Mapping[str, Any], *, wide: str) -> Plot:
    lines = [_line("gap", 1, gap["t"], gap["gap"])]
    if any(value is not None for value in gap["bound"]):
        lines.append(_line("its bound", 2, gap["t"], gap["bound"], dash=True))
    worst = shown(report.numbers.get("gap_over_bound"), "share")
    return {
        "type": "line",
        "wide": wide,
        "ends": True,
        "caption": "Service gap and its bound",
        "note": "Largest gap of all replicas between clients that wait, and what that order"
        " promised.",
        "summary": f"Service gap over time, at most {worst} of its bound.",
        "x": _TIME,
        "y": {"unit": ""},
        "window": report.series["window"],
        "series": lines,
    }


def _ranges(report: Report) -> list[Plot]:
    rows = [row for row in report.clients if row["ttft_p50_s"] is not None]
    if len(rows) < 2:
        return []
    biggest = sorted(rows, key=lambda row: -float(row["service"] or 0))[:MOST_RANGES]
    more = f", the {MOST_RANGES} with most service" if len(rows) > MOST_RANGES else ""
    return [
        {
            "type": "ranges",
            "wide": "half",
            "caption": "TTFT by client",
            "note": f"From the median to the 99th percentile{more}.",
            "summary": "TTFT of each client, median and 99th percentile; the table has the"
            " numbers.",
            "legend": [["P50", 1, "box"], ["P99", 2, "box"]],
            "names": [row["client"] for row in biggest],
            "low": [row["ttft_p50_s"] for row in biggest],
            "high": [row["ttft_p99_s"] for row in biggest],
        }
    ]
