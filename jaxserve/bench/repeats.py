"""What several runs of the same kind say together: means and confidence intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from jaxserve.report.report import Report

# Student's t at 97.5 %, by degrees of freedom from 1.
_T: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_T_MANY: Final = 1.96
_NUMBERS: Final = (
    "requests_per_s",
    "output_tokens_per_s",
    "hit_rate",
    "goodput_share",
    "jain_service",
)
_DISTRIBUTIONS: Final = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
_STATISTICS: Final = ("mean", "p50", "p99")


def run_numbers(report: Report) -> dict[str, float]:
    """A run's main numbers, by the report's names; those that it has."""
    numbers = {name: report.numbers.get(name) for name in _NUMBERS}
    for name in _DISTRIBUTIONS:
        if name in report.distributions:
            statistics = report.distributions[name].statistics
            numbers |= {f"{name} {it}": statistics[it] for it in _STATISTICS}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % confidence interval (Student's t; infinite for one value)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    degrees = len(values) - 1
    t = _T[degrees - 1] if degrees <= len(_T) else _T_MANY
    return mean, t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def repeat_table(runs: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Lines for a person: each number that all runs have."""
    yield f"{f'over {len(runs)} runs':20s}       mean  +- 95 %    runs"
    for name in runs[0]:
        if all(name in run for run in runs):
            values = [run[name] for run in runs]
            mean, half = interval(values)
            shown = "  ".join(f"{value:.4g}" for value in values)
            yield f"{name:20s} {mean:10.4g} {half:8.3g}    {shown}"
