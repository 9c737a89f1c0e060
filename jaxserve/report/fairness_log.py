"""Service windows that the replicas' orders reported: the worst by replica, and a thinned series.

Knows no request and no order. What is thinned out is always the lesser gap of two neighbours, so
that the largest gap of each replica is in the series.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

MOST_SAMPLES: Final = 20_000


@dataclass(slots=True)
class WorstGap:
    """Of one replica: its largest gap with its bound then, its largest gap over bound, and the mean
    of Jain's index, each window weighing as long as it was."""

    gap: float = -math.inf
    bound: float | None = None
    at_s: float = 0.0
    over_bound: float | None = None
    jain_sum: float = 0.0
    jain_weight: float = 0.0
    max_clients: int = 0

    @property
    def jain(self) -> float | None:
        return self.jain_sum / self.jain_weight if self.jain_weight else None


class FairnessLog:
    """Takes the moments of all replicas."""

    def __init__(self) -> None:
        self.worst: dict[int, WorstGap] = {}
        self.thinned = False
        self._samples: list[tuple[int, float, float, float]] = []

    def add(
        self,
        replica: int,
        at_s: float,
        clients: int,
        window_s: float | int,
        gap: float | int,
        bound: float | int | None,
        jain: float | int | None,
    ) -> None:
        if clients < 2:
            return  # nobody to be compared with
        worst = self.worst.get(replica)
        if worst is None:
            worst = self.worst[replica] = WorstGap()
        worst.max_clients = max(worst.max_clients, clients)
        if gap > worst.gap:
            worst.gap, worst.bound, worst.at_s = gap, bound, at_s
        if bound:
            worst.over_bound = max(worst.over_bound or 0.0, gap / bound)
        if jain is not None:
            worst.jain_sum += jain * window_s
            worst.jain_weight += window_s
        self._samples.append((replica, at_s, gap, math.nan if bound is None else bound))
        if len(self._samples) > MOST_SAMPLES:
            self._thin()

    def samples(self) -> np.ndarray:
        """Rows of replica, time, gap, bound (or nan), by time."""
        table = np.array(self._samples).reshape(-1, 4)
        return table[np.argsort(table[:, 1], kind="stable")]

    def _thin(self) -> None:
        self.thinned = True
        table = self.samples()
        table = table[np.argsort(table[:, 0], kind="stable")]
        first, second = table[: len(table) // 2 * 2 : 2], table[1::2]
        keep_second = (second[:, 2] > first[:, 2]) | (first[:, 0] != second[:, 0])
        keep_first = ~keep_second | (first[:, 0] != second[:, 0])
        rows = np.concatenate([first[keep_first], second[keep_second], table[len(first) * 2 :]])
        self._samples = [(int(row[0]), *map(float, row[1:])) for row in rows]  # type: ignore
