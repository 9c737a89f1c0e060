"""The slices of a run: totals by replica, busy time over time, lengths; the first ones in full.

Knows no request. Memory does not grow with the run, but for the slices that are kept in full.
"""

from typing import Final

import numpy as np

COLUMNS: Final = (
    "replica",
    "begin_s",
    "end_s",
    "steps",
    "rows",
    "prefill_tokens",
    "output_tokens",
    "pad_tokens",
    "invalid_tokens",
)
TOTALS: Final = (
    "slices",
    "busy_s",
    "steps",
    "row_steps",
    "rows",
    "prefill_tokens",
    "output_tokens",
    "pad_tokens",
    "invalid_tokens",
)
"""What is summed for each replica."""
NUM_BINS: Final = 192
"""Of busy time over time, at most; at least half as many but in very short runs."""
_FIRST_BIN_S: Final = 1 / 64
_PER_DECADE: Final = 16
_LEAST_DECADE, _MOST_DECADE = -6, 5
SECONDS_EDGES: Final = 10.0 ** (
    np.arange((_MOST_DECADE - _LEAST_DECADE) * _PER_DECADE + 1) / _PER_DECADE + _LEAST_DECADE
)
_PENDING: Final = len(COLUMNS) * 8192


class SliceLog:
    """Takes slices as rows of `COLUMNS` and keeps the first `keep` of them."""

    def __init__(self, keep: int):
        self.num_slices = 0
        self.max_s = 0.0
        self.bin_s = _FIRST_BIN_S
        self._keep = keep
        self._kept: list[np.ndarray] = []
        self._pending: list[float | int] = []
        self._totals = np.zeros((0, len(TOTALS)))
        self._last_end_s = np.zeros(0)
        self._busy_s = np.zeros((0, NUM_BINS))
        self._by_seconds = np.zeros(len(SECONDS_EDGES) + 1, np.int64)
        self._by_steps = np.zeros(0, np.int64)

    def add(self, row: tuple[float | int, ...]) -> None:
        pending = self._pending
        pending += row
        if len(pending) >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Take in what waits; the properties below do it by themselves."""
        if not self._pending:
            return
        table = np.array(self._pending).reshape(-1, len(COLUMNS))
        self._pending.clear()
        room = self._keep - self.num_slices
        if room > 0:
            self._kept.append(table[:room])
        self.num_slices += len(table)
        replica = table[:, 0].astype(np.int64)
        self._grow(int(replica.max()) + 1)
        seconds = table[:, 2] - table[:, 1]
        self._sum(replica, seconds, table)
        self._spread(replica, table[:, 1], table[:, 2])
        self.max_s = max(self.max_s, float(seconds.max()))
        places = np.searchsorted(SECONDS_EDGES, seconds, side="right")
        self._by_seconds += np.bincount(places, minlength=len(self._by_seconds))
        counts = np.bincount(table[:, 3].astype(np.int64), minlength=len(self._by_steps))
        counts[: len(self._by_steps)] += self._by_steps
        self._by_steps = counts

    @property
    def num_replicas(self) -> int:
        self.flush()
        return len(self._totals)

    @property
    def totals(self) -> dict[str, np.ndarray]:
        """`TOTALS` by name, each a number for each replica."""
        self.flush()
        return {name: self._totals[:, place] for place, name in enumerate(TOTALS)}

    @property
    def last_end_s(self) -> np.ndarray:
        """When each replica's last slice ended; 0 where none ran."""
        self.flush()
        return self._last_end_s

    @property
    def busy_share(self) -> np.ndarray:
        """Share of each `bin_s` from the run's start in which each replica was busy: replicas by
        bins."""
        self.flush()
        end_s = float(self._last_end_s.max(initial=0.0))
        return self._busy_s[:, : int(np.ceil(end_s / self.bin_s))] / self.bin_s

    @property
    def by_seconds(self) -> np.ndarray:
        """How many slices took from one of `SECONDS_EDGES` to the next; first and last: beyond."""
        self.flush()
        return self._by_seconds

    @property
    def by_steps(self) -> np.ndarray:
        """How many slices had 0, 1, 2 ... steps."""
        self.flush()
        return self._by_steps

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """The first slices, by column."""
        self.flush()
        table = np.concatenate(self._kept) if self._kept else np.zeros((0, len(COLUMNS)))
        return {name: table[:, place] for place, name in enumerate(COLUMNS)}

    def _grow(self, num_replicas: int) -> None:
        missing = num_replicas - len(self._totals)
        if missing > 0:
            self._totals = np.pad(self._totals, ((0, missing), (0, 0)))
            self._busy_s = np.pad(self._busy_s, ((0, missing), (0, 0)))
            self._last_end_s = np.pad(self._last_end_s, (0, missing))

    def _sum(self, replica: np.ndarray, seconds: np.ndarray, table: np.ndarray) -> None:
        steps, rows = table[:, 3], table[:, 4]
        columns = (np.ones(len(table)), seconds, steps, steps * rows, rows, *table[:, 5:].T)
        for place, column in enumerate(columns):
            self._totals[:, place] += np.bincount(replica, column, len(self._totals))
        np.maximum.at(self._last_end_s, replica, table[:, 2])

    def _spread(self, replica: np.ndarray, begin_s: np.ndarray, end_s: np.ndarray) -> None:
        """Add each slice's time to the bins that it lies in."""
        while end_s.max() > self.bin_s * NUM_BINS:
            pairs = self._busy_s.reshape(len(self._busy_s), NUM_BINS // 2, 2)
            self._busy_s = np.pad(pairs.sum(axis=2), ((0, 0), (0, NUM_BINS // 2)))
            self.bin_s *= 2
        begin_s = np.maximum(begin_s, 0.0)
        place = np.minimum((begin_s / self.bin_s).astype(np.int64), NUM_BINS - 1)
        while len(place):
            bin_end_s = (place + 1) * self.bin_s
            part_s = np.minimum(end_s, bin_end_s) - begin_s
            flat = np.bincount(replica * NUM_BINS + place, part_s, self._busy_s.size)
            self._busy_s += flat.reshape(self._busy_s.shape)
            longer = (end_s > bin_end_s) & (place < NUM_BINS - 1)
            replica, place = replica[longer], place[longer] + 1
            begin_s, end_s = bin_end_s[longer], end_s[longer]
