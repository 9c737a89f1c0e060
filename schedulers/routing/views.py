"""What is known of each replica, in columns: load reports, and what was sent since they were made.

Reports are old when they come: between two of them everybody would pick the same replica. So what
is sent counts at once, and stays *in flight* until a report comes that has seen it: dispatches to a
replica are numbered, and each report says how many of them the replica had received. A report that
is late or lost changes nothing for good, the next one covers it; one that comes after a newer one
is ignored. Knows no policy and no prefix.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

SMOOTHING: Final = 0.3
"""Weight of a new rate in its average."""


@dataclass(slots=True, kw_only=True)
class LoadReport:
    """What a replica says of itself at `at_s`, which is on its own clock and orders its reports.
    Never changed once made; not frozen, which takes three times as long.

    `num_received` dispatches had reached it by then. Tokens: `waiting_tokens` of prompts in its
    queue are not cached, `waiting_prompt_tokens` are all of them; `kv_free_tokens` of
    `kv_total_tokens` can be had, being free, or cached and read by nobody. Rates are tokens per
    second over the last second or so: prompt tokens computed, KV released, output tokens made.
    """

    at_s: float
    num_received: int
    num_waiting: int
    num_running: int
    waiting_tokens: int
    waiting_prompt_tokens: int
    kv_free_tokens: int
    kv_total_tokens: int
    prefill_rate: float = 0.0
    release_rate: float = 0.0
    decode_rate: float = 0.0


_INT_COLUMNS: Final = (
    "outstanding",
    "dispatched",
    "num_waiting",
    "num_running",
    "waiting_tokens",
    "waiting_prompt_tokens",
    "kv_free_tokens",
    "kv_total_tokens",
    "in_flight",
    "in_flight_tokens",
    "in_flight_prompt_tokens",
)
_RATE_COLUMNS: Final = ("prefill_rate", "release_rate", "decode_rate")
_FLAG_COLUMNS: Final = ("healthy", "reported")


class Views:
    """Columns of length R, one place per replica; policies read them and change nothing.

    `outstanding`: requests sent there that have not ended, by the router's own count. `dispatched`:
    the number of the last one sent. `in_flight`, `in_flight_tokens` (uncached, as believed) and
    `in_flight_prompt_tokens`: what no report has seen. Rates are exponential averages, 0 while
    unknown. A rate counts when work waited, or when it is above the average: that of a replica with
    little to do says nothing of what it can do. `candidates`: the indices of healthy replicas,
    ascending; `candidate_bits`: the same as the bits of an int. `now_s`: when the router was last
    told of anything. The other columns are those of the last report, 0 before the first.
    """

    def __init__(self, num_replicas: int, *, smoothing: float = SMOOTHING):
        self._smoothing = smoothing
        self.now_s = 0.0
        self.outstanding: np.ndarray
        self.dispatched: np.ndarray
        self.num_waiting: np.ndarray
        self.num_running: np.ndarray
        self.waiting_tokens: np.ndarray
        self.waiting_prompt_tokens: np.ndarray
        self.kv_free_tokens: np.ndarray
        self.kv_total_tokens: np.ndarray
        self.in_flight: np.ndarray
        self.in_flight_tokens: np.ndarray
        self.in_flight_prompt_tokens: np.ndarray
        self.prefill_rate: np.ndarray
        self.release_rate: np.ndarray
        self.decode_rate: np.ndarray
        self.healthy: np.ndarray
        self.reported: np.ndarray
        for names, dtype in (
            (_INT_COLUMNS, np.int64),
            (_RATE_COLUMNS, np.float64),
            (_FLAG_COLUMNS, np.bool_),
        ):
            for name in names:
                setattr(self, name, np.zeros(num_replicas, dtype))
        self.healthy[:] = True
        # By replica: (number, uncached tokens, prompt tokens) of what no report has seen.
        self._unseen: list[deque[tuple[int, int, int]]] = [deque() for _ in range(num_replicas)]
        self._reported_s = [-np.inf] * num_replicas
        self._note_health()

    def __len__(self) -> int:
        return len(self.healthy)

    @property
    def kv_use(self) -> np.ndarray:
        """The share of KV memory in use by the last report, [R] float; 0 before the first."""
        total = np.maximum(self.kv_total_tokens, 1)
        return np.where(self.kv_total_tokens > 0, 1.0 - self.kv_free_tokens / total, 0.0)

    def least(
        self, scores: np.ndarray, among: np.ndarray | None = None, *, by_index: bool = False
    ) -> int:
        """The replica of the smallest of `scores` [R] `among` these indices, or all candidates.

        Of equals the one with the fewest outstanding requests, then the lowest index; with
        `by_index` the lowest index alone.
        """
        among = self.candidates if among is None else among
        found = scores if len(among) == len(scores) else scores[among]
        if by_index:
            return int(among[found.argmin()])
        equals = among[found == found.min()]
        return int(equals[self.outstanding[equals].argmin()] if len(equals) > 1 else equals[0])

    # What the router tells.

    def sent(self, replica: int, *, num_extend_tokens: int, num_prompt_tokens: int) -> int:
        """A request was sent; returns its dispatch number there, which counts from 1."""
        self.outstanding[replica] += 1
        self.dispatched[replica] += 1
        self.in_flight[replica] += 1
        self.in_flight_tokens[replica] += num_extend_tokens
        self.in_flight_prompt_tokens[replica] += num_prompt_tokens
        number = int(self.dispatched[replica])
        self._unseen[replica].append((number, num_extend_tokens, num_prompt_tokens))
        return number

    def ended(self, replica: int) -> None:
        """A request that was sent there is over."""
        self.outstanding[replica] -= 1

    def report(self, replica: int, report: LoadReport) -> None:
        """Take a report in, unless a newer one came before it."""
        if report.at_s < self._reported_s[replica]:
            return
        self._reported_s[replica] = report.at_s
        self.reported[replica] = True
        for name in (
            "num_waiting",
            "num_running",
            "waiting_tokens",
            "waiting_prompt_tokens",
            "kv_free_tokens",
            "kv_total_tokens",
        ):
            getattr(self, name)[replica] = getattr(report, name)
        for name in _RATE_COLUMNS:
            self._average(getattr(self, name), replica, getattr(report, name), report)
        self._see(replica, report.num_received)

    def _average(self, averages: np.ndarray, replica: int, rate: float, report: LoadReport) -> None:
        known = averages[replica]
        if known == 0.0:
            averages[replica] = rate
        elif report.num_waiting or rate > known:
            averages[replica] += self._smoothing * (rate - known)

    def _see(self, replica: int, num_received: int) -> None:
        unseen = self._unseen[replica]
        while unseen and unseen[0][0] <= num_received:
            _, extend, prompt = unseen.popleft()
            self.in_flight[replica] -= 1
            self.in_flight_tokens[replica] -= extend
            self.in_flight_prompt_tokens[replica] -= prompt

    def set_healthy(self, replica: int, healthy: bool) -> None:
        """Whether requests may be sent there. What is known of it stays."""
        self.healthy[replica] = healthy
        self._note_health()

    def lost(self, replica: int) -> None:
        """The replica is gone, with all that it had."""
        for name in (*_INT_COLUMNS, *_RATE_COLUMNS, *_FLAG_COLUMNS):
            getattr(self, name)[replica] = 0
        self._unseen[replica].clear()
        self._reported_s[replica] = -np.inf
        self._note_health()

    def joined(self, replica: int) -> None:
        """A fresh replica, in a place that was lost, or, where `replica` is R, in a new one."""
        if replica == len(self):
            for name in (*_INT_COLUMNS, *_RATE_COLUMNS, *_FLAG_COLUMNS):
                column = getattr(self, name)
                setattr(self, name, np.append(column, np.zeros(1, column.dtype)))
            self._unseen.append(deque())
            self._reported_s.append(-np.inf)
        self.set_healthy(replica, True)

    def _note_health(self) -> None:
        self.candidates = np.flatnonzero(self.healthy)
        packed = np.packbits(self.healthy, bitorder="little")
        self.candidate_bits = int.from_bytes(packed.tobytes(), "little")
