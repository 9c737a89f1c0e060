"""The report on a run, as a record, and its JSON. Knows neither how it is measured nor shown.

A report is plain data, so that what was written once can be shown and compared later.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from jaxserve.errors import ConfigError
from jaxserve.report.definitions import (
    CLIENT_COLUMNS,
    METRICS,
    PERCENTILES,
    REPLICA_COLUMNS,
    STATISTICS,
)

SCHEMA: Final = "jaxserve.report/1"
KINDS: Final = ("live", "simulated")
MOST_ROWS: Final = 200_000
"""Requests that a report has rows of."""

Number = float | int | None
Cell = Number | str
Table = Mapping[str, list[Any]]
"""Columns of the same length by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What was run: all that a reader needs to run it again, and a comparison to tell runs apart.

    `kind` is one of `KINDS`. `workload` describes it (name, source, licence, parameters); runs can
    be compared if it is the same. `profile` is of the serving-time model, if there is one.
    """

    kind: str
    title: str = ""
    configuration: Mapping[str, str] = field(default_factory=dict)
    workload: Mapping[str, str] = field(default_factory=dict)
    profile: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """`num` values: the `STATISTICS` by name, and the values at `QUANTILES`, for a curve."""

    num: int
    statistics: Mapping[str, float | int]
    curve: tuple[float | int, ...]


QUANTILES: Final = (
    0.0,
    0.001,
    0.005,
    *(percent / 100 for percent in range(1, 100)),
    0.992,
    0.994,
    0.996,
    0.998,
    0.999,
    1.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run, measured.

    `measured` says how, in words by name: window, limits, prices. `numbers` and `distributions` are
    those of `METRICS`, by name; what is not known is None, or is missing there. `clients` and
    `replicas` are rows of `CLIENT_COLUMNS` and `REPLICA_COLUMNS`. `series` are for plots. `rows`
    has a row for each request, `slices` one for each of the first slices; both may be missing.
    `against` is what it was compared with: see `errors.py`.
    """

    about: About
    measured: Mapping[str, str]
    numbers: Mapping[str, Number]
    distributions: Mapping[str, Distribution]
    clients: tuple[Mapping[str, Cell], ...] = ()
    replicas: tuple[Mapping[str, Cell], ...] = ()
    series: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rows: Table | None = None
    slices: Table | None = None
    against: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        return self.about.title or f"a {self.about.kind} run"

    def value(self, name: str) -> Number:
        """A number by name, such as "hit_rate", or of a distribution, such as "ttft_s.p99"."""
        metric, _, statistic = name.partition(".")
        if not statistic:
            return self.numbers.get(metric)
        known = self.distributions.get(metric)
        return None if known is None else known.statistics[statistic]


def to_json(report: Report, *, rows: bool = True) -> str:
    """The report in JSON, with the definitions of its numbers; `rows`: with those of requests.
    Slices are not in it: the Chrome trace has them."""
    whole = asdict(report)
    del whole["slices"]
    if not rows:
        whole["rows"] = None
    for name, distribution in whole["distributions"].items():
        whole["distributions"][name] = {"num": distribution["num"]} | dict(
            distribution["statistics"], curve=distribution["curve"]
        )
    return json.dumps({"schema": SCHEMA, **whole, "definitions": definitions()}, allow_nan=False)


def definitions() -> dict[str, str]:
    """What each number means, by name; of tables, by "clients." or "replicas." and column."""
    texts = {name: f"{metric.unit}: {metric.definition}" for name, metric in METRICS.items()}
    texts |= {f"clients.{column.name}": column.definition for column in CLIENT_COLUMNS}
    texts |= {f"replicas.{column.name}": column.definition for column in REPLICA_COLUMNS}
    return texts | {"percentiles": PERCENTILES}


def from_json(text: str, *, name: str = "report") -> Report:
    """The inverse of `to_json`. Raises ConfigError, naming `name`, for anything else."""
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: not JSON ({error}); allowed: a report's JSON file") from None
    schema = whole.get("schema") if isinstance(whole, dict) else None
    if schema != SCHEMA:
        raise ConfigError(f"{name}: got schema {schema!r}; allowed: {SCHEMA!r}")
    try:
        return _report(whole)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{name}: a damaged report ({type(error).__name__}: {error})") from None


def read_report(path: str) -> Report:
    """The report in a JSON file. Raises ConfigError if there is none."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{path}: {reason}; allowed: a report's JSON file") from None
    return from_json(text, name=path)


def _report(whole: dict[str, Any]) -> Report:
    values = {each.name: whole[each.name] for each in fields(Report) if each.name != "slices"}
    values["about"] = About(**values["about"])
    values["distributions"] = {
        name: Distribution(
            num=known["num"],
            statistics={statistic: known[statistic] for statistic in STATISTICS},
            curve=tuple(known["curve"]),
        )
        for name, known in values["distributions"].items()
    }
    for name in ("clients", "replicas", "notes"):
        values[name] = tuple(values[name])
    return Report(**values)


def rounded(value: float | int, digits: int = 9) -> float | None:
    """To so many digits that matter; None for what is no number. Keeps files small and alike."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Numbers rounded, and whole ones as such; other things as they are."""
    if not isinstance(value, int | float):
        return value
    short = rounded(float(value))
    return int(short) if short is not None and short.is_integer() else short
