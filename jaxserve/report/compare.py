"""Several runs side by side: their numbers, ratios to the first, and how they were set. Draws
nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.text import Text

from jaxserve.errors import ConfigError
from jaxserve.report.console import make_console, table_of
from jaxserve.report.definitions import DISTRIBUTIONS, HIGHER, LOWER, NUMBERS, Metric
from jaxserve.report.report import Number, Report
from jaxserve.report.text import NOTHING, shown, statistic

COMPARED_STATISTICS: Final = ("mean", "p50", "p99")
BETTER, WORSE, SAME = "better", "worse", ""
SAME_WITHIN: Final = 0.005
"""Relative difference up to which a number counts as the same."""
MOST_LETTERS: Final = 50
"""Of all runs' names together in the heads of tables; longer ones are listed before."""
_MARKS: Final = {BETTER: "▲", WORSE: "▼", SAME: " "}
_STYLES: Final = {BETTER: "green", WORSE: "red", SAME: ""}


@dataclass(frozen=True, slots=True)
class Line:
    """One number of all runs: `ratios` and `marks` (`BETTER`, `WORSE`, `SAME`) are to the first
    run's; None where there is none."""

    metric: Metric
    statistic: str
    values: tuple[Number, ...]
    ratios: tuple[Number, ...]
    marks: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.metric.title} {statistic(self.statistic)}".strip()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs by unique names. `differing` has what they were set to differently: by name a value for
    each run."""

    names: tuple[str, ...]
    reports: tuple[Report, ...]
    lines: tuple[Line, ...]
    differing: Mapping[str, tuple[str, ...]]


def compare(
    reports: Sequence[Report], *, paths: Sequence[str] = (), different_workloads: bool = False
) -> Comparison:
    """Compare with the first. `paths` name the runs in errors, and where titles are the same.

    Raises ConfigError if the runs are of different workloads, unless that is wanted.
    """
    paths = paths or [f"run {place + 1}" for place in range(len(reports))]
    first = reports[0]
    for path, report in zip(paths, reports, strict=True):
        differ = _differing([first.about.workload, report.about.workload])
        if differ and not different_workloads:
            name, (one, other) = next(iter(differ.items()))
            raise ConfigError(
                f"compare: {path} has another workload than {paths[0]} ({name}: {other} and"
                f" {one}); allowed: the same one, or --different_workloads"
            )
    return Comparison(
        names=_names(reports, paths),
        reports=tuple(reports),
        lines=tuple(_lines(reports)),
        differing=_differing([_settings(report) for report in reports]),
    )


def show_comparison(comparison: Comparison) -> None:
    """Print what differs in how the runs were set, and all numbers with ratios to the first run."""
    console = make_console()
    names = comparison.names
    if sum(map(len, names)) > MOST_LETTERS:
        for place, name in enumerate(names):
            console.print(Text(f"run {place + 1}: {name}"))
        names = tuple(f"run {place + 1}" for place in range(len(names)))
    if comparison.differing:
        table = table_of("set differently", ("", *names), words=True)
        for name, values in comparison.differing.items():
            table.add_row(name, *(Text(value, overflow="fold") for value in values))
        console.print(table)
    first, *others = names
    headings = [heading for name in others for heading in (name, "")]
    table = table_of(f"ratios to {first}", ("", first, *headings))
    group = comparison.lines[0].metric.group if comparison.lines else ""
    for line in comparison.lines:
        if line.metric.group != group:
            table.add_section()
            group = line.metric.group
        table.add_row(line.title, shown(line.values[0], line.metric.unit), *_cells(line))
    console.print(table)
    console.print(Text("▲ better than the first, ▼ worse, by more than 0.5 %", style="dim"))


def _cells(line: Line) -> list[Text]:
    cells = []
    rest = zip(line.values[1:], line.ratios[1:], line.marks[1:], strict=True)
    for value, ratio, mark in rest:
        cells.append(Text(shown(value, line.metric.unit)))
        text = NOTHING if ratio is None else f"{ratio:.3g}x"
        cells.append(Text(f"{text} {_MARKS[mark]}", style=_STYLES[mark]))
    return cells


def _lines(reports: Sequence[Report]) -> list[Line]:
    lines = []
    for metric in DISTRIBUTIONS:
        for name in COMPARED_STATISTICS:
            values = [report.value(f"{metric.name}.{name}") for report in reports]
            lines.append(_line(metric, name, values))
    for metric in NUMBERS:
        lines.append(_line(metric, "", [report.value(metric.name) for report in reports]))
    return [line for line in lines if any(value is not None for value in line.values)]


def _line(metric: Metric, of: str, values: Sequence[Number]) -> Line:
    first = values[0]
    ratios = [None if value is None or not first else value / first for value in values]
    marks = [_mark(metric.better, first, value) for value in values]
    return Line(metric, of, tuple(values), tuple(ratios), tuple(marks))


def _mark(better: str, first: Number, value: Number) -> str:
    if first is None or value is None or abs(value - first) <= SAME_WITHIN * abs(first):
        return SAME
    if better not in (LOWER, HIGHER):
        return SAME
    return BETTER if (value < first) == (better == LOWER) else WORSE


def _settings(report: Report) -> dict[str, str]:
    about = report.about
    return {
        "kind": about.kind,
        **about.configuration,
        **{f"workload {name}": value for name, value in about.workload.items()},
        **{f"profile {name}": value for name, value in about.profile.items()},
        **{f"version of {name}": value for name, value in about.versions.items()},
        **{f"seed of {name}": str(seed) for name, seed in about.seeds.items()},
        **{
            f"measured: {name}": text
            for name, text in report.measured.items()
            if name != "window"  # ends with the run, so that no two are alike
        },
    }


def _differing(settings: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    names = dict.fromkeys(name for each in settings for name in each)
    found = {name: tuple(str(each.get(name, NOTHING)) for each in settings) for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _names(reports: Sequence[Report], paths: Sequence[str]) -> tuple[str, ...]:
    titles = [report.title for report in reports]
    if len(set(titles)) == len(titles):
        return tuple(titles)
    if len(set(paths)) == len(paths):
        return tuple(paths)
    return tuple(f"{place + 1}: {title}" for place, title in enumerate(titles))
