"""Configuration of the report: what a run writes, and what is compared. Knows no flags."""

import math
from dataclasses import dataclass

from jaxserve.errors import ConfigError
from jaxserve.report.options import Limits, MeasureOptions

MOST_COMPARED = 8


def _require(condition: bool, field: str, got: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """What is written of a run, each a file and "" for none, and how the run is measured.

    `json_rows` and `csv` are of single requests; `csv_clients` has a row for each client. A limit
    of None bounds nothing, and without any there is no goodput. `warmup_s` and `cooldown_s` are cut
    off the time in which requests are sent; None: a tenth of it. `w_in` and `w_out` are the
    service prices of prompt and output tokens.
    """

    json: str = ""
    json_rows: bool = True
    html: str = ""
    csv: str = ""
    csv_clients: str = ""
    chrome_trace: str = ""
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    slo_e2e_s: float | None = None
    warmup_s: float | None = None
    cooldown_s: float | None = None
    w_in: float = 1.0
    w_out: float = 2.0

    def __post_init__(self) -> None:
        for field in ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_s"):
            limit = getattr(self, field)
            good = limit is None or (math.isfinite(limit) and limit > 0)
            _require(good, field, limit, "a positive number, or unset")
        for field in ("warmup_s", "cooldown_s"):
            part_s = getattr(self, field)
            good = part_s is None or (math.isfinite(part_s) and part_s >= 0)
            _require(good, field, part_s, "0 or more seconds, or unset")
        for field in ("w_in", "w_out"):
            price = getattr(self, field)
            _require(math.isfinite(price) and price >= 0, field, price, "0 or a positive number")
        _require(self.w_in + self.w_out > 0, "w_out", self.w_out, "positive where w_in is 0")
        named = [path for path in self.files.values() if path]
        twice = sorted({path for path in named if named.count(path) > 1})
        if twice:
            raise ConfigError(f"output: got {twice[0]!r} twice; allowed: a file for each form")

    @property
    def files(self) -> dict[str, str]:
        """The file of each form, by its flag; "" for none."""
        names = ("json", "html", "csv", "csv_clients", "chrome_trace")
        return {name: getattr(self, name) for name in names}

    @property
    def limits(self) -> Limits:
        def seconds(limit_ms: float | None) -> float | None:
            return None if limit_ms is None else limit_ms / 1e3

        return Limits(
            ttft_s=seconds(self.slo_ttft_ms),
            tpot_s=seconds(self.slo_tpot_ms),
            e2e_s=self.slo_e2e_s,
        )

    @property
    def measure_options(self) -> MeasureOptions:
        return MeasureOptions(
            warmup_s=self.warmup_s,
            cooldown_s=self.cooldown_s,
            limits=self.limits,
            w_in=self.w_in,
            w_out=self.w_out,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Runs to show side by side: JSON files that `simulate` or `bench` wrote; one alone is shown as
    it was. `html` is a file to write, "" for none."""

    compare: tuple[str, ...] = ()
    different_workloads: bool = False
    html: str = ""

    def __post_init__(self) -> None:
        num = len(self.compare)
        allowed = f"1 to {MOST_COMPARED} files, each with a --compare of its own"
        _require(1 <= num <= MOST_COMPARED, "compare", ", ".join(self.compare), allowed)
