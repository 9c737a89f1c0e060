"""The rate sweep: which rates a server keeps up with, and the knee, the highest of them.

Rates grow by a factor until one is too much; then the gap between it and the last one is halved,
by ratio, until it is small. What keeping up means is said by `judge`. Sends nothing itself.
"""

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from jaxserve.bench.tally import Row, Tally
from jaxserve.report.options import Limits

FOLLOWS: Final = 0.95
"""Without limits: share of the requests of the window that must be answered by its end."""
GROWTH: Final = 1.5
"""Without limits: most that the P99 of the time to the first token may grow from the first half of
the window to the second. Above the knee it grows by the queue, and doubles."""
SLACK_S: Final = 0.010
"""Growth below this is no queue."""
MAX_POINTS: Final = 40


def meets(row: Row, limits: Limits) -> bool:
    """Whether the answer came in full and in time."""
    pairs = (
        (row.ttft_s, limits.ttft_s),
        (row.tpot_s, limits.tpot_s),
        (row.e2e_s, limits.e2e_s),
    )
    return row.good and all(most is None or got <= most for got, most in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One rate, over its steady window: requests due from the warm-up's end to the sending's.

    `rate` is the one wanted, `offered` the one there was, in requests/s. `good_share` is of the
    requests that met the limits; `answered_share`, of requests answered in the window to those due
    in it. Of answers that never began no time is known: times are of the others.
    """

    rate: float
    offered: float
    num_requests: int
    window_s: float
    good_share: float
    answered_share: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_growth: float
    tpot_p50_s: float
    e2e_p99_s: float
    num_failed: int
    client_late_p99_s: float
    keeps_up: bool


def judge(tally: Tally, *, rate: float, until_s: float, limits: Limits, share: float) -> Point:
    """The run in `tally` as a point; sending ended at `until_s`.

    With limits a rate is kept up with when at least `share` of its requests meet them; without,
    when answers follow the offered rate and the time to the first token does not grow.
    """
    rows = [row for row in tally.steady_rows() if row.due_s <= until_s]
    window_s = max(until_s - tally.warm_up_s, 1e-9)
    begun = [row for row in rows if row.first_s >= 0]
    ended = [row.ended_s for row in tally.rows.values() if row.good]
    answered = sum(tally.warm_up_s <= at_s < until_s for at_s in ended)
    answered_share = answered / len(rows) if rows else 0.0
    good_share = sum(meets(row, limits) for row in rows) / len(rows) if rows else 0.0
    growth, queues = _growth(rows, tally.warm_up_s + window_s / 2)
    if limits.given:
        keeps_up = bool(rows) and good_share >= share
    else:
        keeps_up = bool(rows) and answered_share >= FOLLOWS and not queues
    good = [row for row in rows if row.good]
    return Point(
        rate=rate,
        offered=len(rows) / window_s,
        num_requests=len(rows),
        window_s=window_s,
        good_share=good_share,
        answered_share=answered_share,
        tokens_per_s=sum(row.tokens for row in good if row.ended_s < until_s) / window_s,
        ttft_p50_s=_percentile([row.ttft_s for row in begun], 50.0),
        ttft_p99_s=_percentile([row.ttft_s for row in begun], 99.0),
        ttft_growth=growth,
        tpot_p50_s=_percentile([row.tpot_s for row in good], 50.0),
        e2e_p99_s=_percentile([row.e2e_s for row in good], 99.0),
        num_failed=sum(row.reason in ("error", "refused", "deadline") for row in rows),
        client_late_p99_s=tally.lateness_p99_s(),
        keeps_up=keeps_up,
    )


def _growth(rows: Sequence[Row], middle_s: float) -> tuple[float, bool]:
    """P99 TTFT of the second half over the first's, and whether that is a queue's."""
    halves = ([], [])
    for row in rows:
        if row.first_s >= 0:
            halves[row.due_s >= middle_s].append(row.ttft_s)
    first_s, second_s = (_percentile(half, 99.0) for half in halves)
    if not (first_s > 0 and math.isfinite(second_s)):
        return math.nan, False
    return second_s / first_s, second_s > GROWTH * first_s + SLACK_S


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if len(values) else math.nan


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points by rate, and the knee: None when the server kept up with none of them.

    `bounded`: a higher rate was too much; otherwise the knee lies beyond the last rate tried.
    """

    points: tuple[Point, ...]
    knee: Point | None
    bounded: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "knee": None if self.knee is None else self.knee.rate,
            "bounded": self.bounded,
            "points": [_plain(point) for point in self.points],
        }

    def table(self) -> Iterator[str]:
        """Lines for a person."""
        yield (
            "req/s  offered  requests  good %  answered %  tokens/s  TTFT ms p50      p99  growth"
            "  TPOT ms p50  E2E s p99  failed  late ms  keeps up"
        )
        for p in self.points:
            mark = "*" if p is self.knee else " "
            yield (
                f"{p.rate:5.2f}  {p.offered:7.2f}  {p.num_requests:8d}  {100 * p.good_share:6.1f}"
                f"  {100 * p.answered_share:10.1f}  {p.tokens_per_s:8.0f}"
                f"  {1e3 * p.ttft_p50_s:11.1f}  {1e3 * p.ttft_p99_s:7.1f}  {p.ttft_growth:6.2f}"
                f"  {1e3 * p.tpot_p50_s:11.2f}  {p.e2e_p99_s:9.2f}  {p.num_failed:6d}"
                f"  {1e3 * p.client_late_p99_s:7.1f}  {'yes' if p.keeps_up else 'no':>7s}{mark}"
            )
        yield self.verdict()

    def verdict(self) -> str:
        if self.knee is None:
            return f"no knee: already {self.points[0].rate:.3g} requests/s were too much"
        beyond = "" if self.bounded else " or more: no rate tried was too much"
        knee = self.knee
        return f"knee: {knee.rate:.3g} requests/s{beyond} ({knee.offered:.3g} were offered)"


def _plain(point: Point) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(point).items()
    }


async def find_knee(
    measure: Callable[[float], Awaitable[Point | None]],
    *,
    least: float,
    most: float,
    factor: float = 2.0,
    tolerance: float = 0.05,
) -> Sweep:
    """Measure rates between `least` and `most` requests/s until the knee is known to `tolerance`.

    `measure` gives None to end the sweep with what there is.
    """
    points: list[Point] = []

    async def kept(rate: float) -> bool | None:
        point = await measure(rate) if len(points) < MAX_POINTS else None
        if point is None:
            return None
        points.append(point)
        return point.keeps_up

    low, high, rate = 0.0, math.inf, least
    while high == math.inf:
        keeps_up = await kept(rate)
        if keeps_up is None:
            return _swept(points)
        if not keeps_up:
            high = rate
        elif rate >= most:
            return _swept(points)
        else:
            low, rate = rate, min(rate * factor, most)
    while low and high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        keeps_up = await kept(middle)
        if keeps_up is None:
            break
        low, high = (middle, high) if keeps_up else (low, middle)
    return _swept(points)


def _swept(points: Sequence[Point]) -> Sweep:
    by_rate = sorted(points, key=lambda point: point.rate)
    too_much = [point.rate for point in by_rate if not point.keeps_up]
    lowest = min(too_much, default=math.inf)
    kept = [point for point in by_rate if point.keeps_up and point.rate < lowest]
    return Sweep(tuple(by_rate), kept[-1] if kept else None, bool(too_much))
