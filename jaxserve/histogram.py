"""Histograms that are cheap to feed and can cross a process. Knows no metric, no label, no format.

Our own, because one observation may stand for many values (the k tokens of a slice), the dispatch
thread feeds them, and the engine's have to travel to the front end as plain numbers by name.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Final

INFINITY: Final = float("inf")
_MOST_LOOSE: Final = 256
"""Values that may wait until they are counted."""


class Histogram:
    """How many values fell up to each of `bounds`, and their sum. One thread owns it.

    `bounds` grow strictly and are finite; values beyond the last are counted too. Raises ValueError
    for other bounds. An engine observes several values a slice, and somebody reads them once in
    thousands: they are counted then, or when many wait.
    """

    __slots__ = ("_counts", "_loose", "_sum", "bounds")

    def __init__(self, bounds: Sequence[float | int]):
        self.bounds = tuple(map(float, bounds))
        grow = all(a < b for a, b in pairwise((-INFINITY, *self.bounds, INFINITY)))
        if not self.bounds or not grow:
            raise ValueError(f"bounds: got {self.bounds}; allowed: finite numbers that grow")
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0
        self._loose: list[float | int] = []

    def observe(self, value: float | int, count: int = 1) -> None:
        """Take in `count` values that are all `value`."""
        if count != 1:
            self._settle()  # sums are added up in sequence
            self._counts[bisect_left(self.bounds, value)] += count
            self._sum += value * count
            return
        self._loose.append(value)
        if len(self._loose) >= _MOST_LOOSE:
            self._settle()

    def _settle(self) -> None:
        counts, bounds = self._counts, self.bounds
        for value in self._loose:
            counts[bisect_left(bounds, value)] += 1
            self._sum += value
        self._loose.clear()

    @property
    def counts(self) -> list[int]:
        """Values between each bound and the one before it, and beyond the last."""
        self._settle()
        return self._counts

    @property
    def sum(self) -> float:
        self._settle()
        return self._sum

    @property
    def count(self) -> int:
        """Values taken in."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """(bound, values up to it) for each bound, infinity last."""
        total, pairs = 0, []
        for bound, count in zip((*self.bounds, INFINITY), self.counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs

    def copy(self) -> "Histogram":
        """One that no longer changes with this one."""
        other = Histogram.__new__(Histogram)
        other.bounds, other._counts, other._sum = self.bounds, self.counts.copy(), self.sum
        other._loose = []
        return other

    def flat(self, name: str) -> dict[str, float]:
        """Everything as numbers by name: `name_bucket_<bound>`, each with the values up to it, and
        `name_sum`."""
        totals = [float(total) for _, total in self.cumulative()]
        values = dict(zip(_bucket_names(name, self.bounds), totals, strict=True))
        values[f"{name}_sum"] = self.sum
        return values

    @classmethod
    def from_flat(cls, name: str, values: Mapping[str, float]) -> "Histogram | None":
        """What `flat(name)` put into `values`, whatever else is there; None if it did not."""
        if f"{name}_sum" not in values:
            return None
        prefix = f"{name}_bucket_"
        totals = {
            float(key[len(prefix) :]): values[key] for key in values if key.startswith(prefix)
        }
        histogram = cls(sorted(totals)[:-1])
        before = 0
        for place, bound in enumerate((*histogram.bounds, INFINITY)):
            histogram._counts[place] = int(totals[bound]) - before
            before = int(totals[bound])
        histogram._sum = values[f"{name}_sum"]
        return histogram


def decades(first: int, last: int) -> tuple[float, ...]:
    """1, 2 and 5 times each power of ten from 10**first on, up to 10**last."""
    steps = [float(f"{digit}e{power}") for power in range(first, last) for digit in (1, 2, 5)]
    return (*steps, float(f"1e{last}"))


@cache
def _bucket_names(name: str, bounds: tuple[float, ...]) -> tuple[str, ...]:
    return tuple(f"{name}_bucket_{bound!r}" for bound in (*bounds, INFINITY))
