"""One number for each thing measured in a run, and what several runs say together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from jaxserve.bench.sweep import Limits
from jaxserve.bench.tally import Tally

# Student's t at 97.5 %, by degrees of freedom from 1.
_T: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_T_MANY: Final = 1.96


def run_numbers(tally: Tally, limits: Limits) -> dict[str, float]:
    """The whole run's main numbers; times of answers in full. NaN where there is nothing."""
    rows = list(tally.rows.values())
    good = [row for row in rows if row.good]
    seconds = max(tally.ended_s, 1e-9)
    numbers = {
        "requests/s": len(good) / seconds,
        "tokens/s": tally.num_tokens / seconds,
    }
    for name, values in (
        ("TTFT ms", [1e3 * row.ttft_s for row in good if row.first_s >= 0]),
        ("TPOT ms", [1e3 * row.tpot_s for row in good if row.tokens > 1]),
        ("E2E ms", [1e3 * row.e2e_s for row in good]),
    ):
        found = np.array(values or [math.nan])
        numbers[f"{name} mean"] = float(found.mean())
        numbers |= {f"{name} P{p}": float(np.percentile(found, p)) for p in (50, 99)}
    if limits.given:
        numbers["good %"] = 100 * sum(map(limits.met, rows)) / max(len(rows), 1)
    return numbers


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % confidence interval (Student's t; infinite for one value)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    degrees = len(values) - 1
    t = _T[degrees - 1] if degrees <= len(_T) else _T_MANY
    return mean, t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def repeat_table(runs: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Lines for a person: each number over all runs."""
    yield f"over {len(runs)} runs     mean  +- 95 %    runs"
    for name in runs[0]:
        values = [run[name] for run in runs]
        mean, half = interval(values)
        shown = "  ".join(f"{value:.4g}" for value in values)
        yield f"{name:12s} {mean:10.4g} {half:8.3g}    {shown}"
