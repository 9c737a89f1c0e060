"""How far a simulation is from the live run that it imitates. Draws nothing."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from jaxserve.report.definitions import DISTRIBUTIONS, NEITHER, NUMBERS
from jaxserve.report.report import Number, Report, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How large an error may be: relative to the live run, or absolute. Of a second live run, 1.5
    times its difference from the first is allowed too."""

    relative: float | None = None
    absolute: float | None = None


_MEAN, _TAIL = Bound(relative=0.05), Bound(relative=0.10)
FIDELITY: Final[Mapping[str, Bound]] = {
    **{f"{name}.mean": _MEAN for name in ("ttft_s", "tpot_s", "e2e_s")},
    **{f"{name}.p99": _TAIL for name in ("ttft_s", "tpot_s", "e2e_s")},
    "hit_rate": Bound(absolute=0.01),
    "jain_service": Bound(absolute=0.02),
}
"""What the simulator promises of loads below the knee."""
FIDELITY_OVERLOAD: Final[Mapping[str, Bound]] = {
    "requests_per_s": Bound(relative=0.03),
    "output_tokens_per_s": Bound(relative=0.03),
    "hit_rate": Bound(absolute=0.01),
    "jain_service": Bound(absolute=0.02),
}
"""And beyond it, where latencies grow for as long as the run lasts."""
REPEATS: Final = 1.5
_COMPARED: Final = (
    *(f"{metric.name}.{name}" for metric in DISTRIBUTIONS for name in ("mean", "p50", "p99")),
    *(
        metric.name
        for metric in NUMBERS
        if metric.group in ("throughput", "goodput", "fairness")
        and metric.better != NEITHER  # numbers that say of how many, or how far, others are
    ),
    "utilisation",
    "slices",
    "slice_s",
    "slice_steps",
    "preemptions",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricError:
    """One number of both runs. `relative` is (simulated - live) / live, None where live is 0;
    `within` says whether the bound was kept, None without one."""

    name: str
    live: float | int
    simulated: float | int
    relative: Number
    within: bool | None
    error_text: str
    bound_text: str


def errors(
    live: Report,
    simulated: Report,
    *,
    bounds: Mapping[str, Bound] | None = None,
    repeated: Report | None = None,
    draws: Sequence[Report] = (),
) -> list[MetricError]:
    """Each number that both runs have. `repeated` is a second live run of the same: how far live
    runs are apart by themselves. `draws` are more simulations of it, whose noise was drawn anew:
    the mean of all is compared."""
    found = []
    for name in _COMPARED:
        ours, theirs = live.value(name), _mean(name, (simulated, *draws))
        if ours is None or theirs is None:
            continue
        again = None if repeated is None else repeated.value(name)
        found.append(_error(name, ours, theirs, (bounds or {}).get(name), again))
    return found


def _mean(name: str, reports: Sequence[Report]) -> Number:
    """None where no report has it; a number that all agree on stays what it is."""
    values = [value for each in reports if (value := each.value(name)) is not None]
    return values[0] if len(set(values)) == 1 else statistics.fmean(values) if values else None


def side_by_side(
    live: Report,
    simulated: Report,
    *,
    bounds: Mapping[str, Bound] | None = FIDELITY,
    repeated: Report | None = None,
    draws: Sequence[Report] = (),
) -> Report:
    """The live run's report with its simulation and all errors in it, for every form; the curves
    are those of `simulated`."""
    rows = errors(live, simulated, bounds=bounds, repeated=repeated, draws=draws)
    against: dict[str, Any] = {
        "title": simulated.title,
        "profile": dict(simulated.about.profile),
        "errors": [asdict(row) for row in rows],
        "curves": {name: list(each.curve) for name, each in simulated.distributions.items()},
        "timeline": simulated.series.get("timeline"),
    }
    return replace(live, against=against)


def _error(
    name: str, live: float | int, simulated: float | int, bound: Bound | None, again: Number
) -> MetricError:
    difference = simulated - live
    relative = rounded(difference / live, 6) if live else None
    absolute = bound is not None and bound.absolute is not None
    if absolute or relative is None:
        error_text = f"{difference:+.4g}"
    else:
        error_text = f"{round(100 * relative, 1) + 0.0:+.1f} %"  # no minus zero
    allowed, bound_text = _allowed(bound, live, again)
    return MetricError(
        name=name,
        live=live,
        simulated=simulated,
        relative=relative,
        within=None if allowed is None else abs(difference) <= allowed,
        error_text=error_text,
        bound_text=bound_text,
    )


def _allowed(bound: Bound | None, live: float | int, again: Number) -> tuple[Number, str]:
    """The largest difference that is within the bound, and the bound in words."""
    if bound is None:
        return None, ""
    if bound.absolute is not None:
        allowed, text = bound.absolute, f"{bound.absolute:g}"
    else:
        assert bound.relative is not None
        allowed, text = bound.relative * abs(live), f"{100 * bound.relative:g} %"
    if again is not None and REPEATS * abs(again - live) > allowed:
        return REPEATS * abs(again - live), f"{REPEATS:g} x live runs' difference"
    return allowed, text
