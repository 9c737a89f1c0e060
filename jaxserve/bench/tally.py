"""What a live run comes to while it runs: counts, lateness, times to the first token. No I/O.

The report is made from the `Recorder`. This is what the live display, the rate sweep and the repeat
need at once, and what only the client knows: its own lateness, and errors by kind.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np

from jaxserve.bench.transport import REFUSED, Ending
from jaxserve.workload.work import Work

LATE_S: Final = 0.005
"""A P99 of the client's lateness beyond this makes its numbers doubtful."""

FAILED: Final = ("error", REFUSED, "deadline")
_RECENT: Final = 1024


@dataclass(slots=True)
class Row:
    """One request, times in seconds from the run's start; negative: not yet."""

    work: Work
    due_s: float
    tokens: int = 0
    first_s: float = -1.0
    last_s: float = -1.0
    ended_s: float = -1.0
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether it was answered in full."""
        return self.reason in ("stop", "length")

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """(E2E - TTFT) / (output tokens - 1); 0 for a single token."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


class Tally:
    """Counts a run. `warm_up_s`: requests due before it are left out of `steady_rows`."""

    def __init__(self, *, warm_up_s: float = 0.0):
        self.warm_up_s = warm_up_s
        self.rows: dict[int, Row] = {}
        self.num_sent = self.num_ended = self.num_failed = self.num_aborted = 0
        self.num_tokens = 0
        self.faults: Counter[str] = Counter()
        self.said: dict[str, str] = {}
        """Of each kind of fault, what the server said first."""
        self.lateness_s: list[float] = []
        self.ended_s = 0.0
        self._recent_s: list[float] = []

    def sent(self, work: Work, due_s: float, late_s: float) -> None:
        self.rows[work.number] = Row(work, due_s)
        self.num_sent += 1
        self.lateness_s.append(max(0.0, late_s))

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        row = self.rows[number]
        if row.first_s < 0:
            row.first_s = at_s
            self._recent_s.append(at_s - row.due_s)
        row.last_s = at_s
        row.tokens += num_tokens
        self.num_tokens += num_tokens

    def ended(self, number: int, at_s: float, ending: Ending) -> None:
        row = self.rows[number]
        row.ended_s, row.reason = at_s, ending.reason
        self.num_ended += 1
        self.num_failed += ending.reason in FAILED
        self.num_aborted += ending.reason == "abort"
        if ending.reason in FAILED:
            kind = ending.fault or ending.reason
            self.faults[kind] += 1
            self.said.setdefault(kind, ending.message)

    def close(self, now_s: float) -> None:
        """The run is over."""
        self.ended_s = now_s

    @property
    def num_running(self) -> int:
        return self.num_sent - self.num_ended

    @property
    def num_done(self) -> int:
        """Answered in full."""
        return self.num_ended - self.num_failed - self.num_aborted

    def recent_ttft_s(self) -> tuple[float, float] | None:
        """P50 and P99 over the latest first tokens."""
        del self._recent_s[:-_RECENT]
        if not self._recent_s:
            return None
        p50, p99 = np.percentile(self._recent_s, (50, 99))
        return float(p50), float(p99)

    def lateness_p99_s(self) -> float:
        """Of how much later than due the client sent requests."""
        return float(np.percentile(self.lateness_s, 99)) if self.lateness_s else 0.0

    def steady_rows(self) -> list[Row]:
        return [row for row in self.rows.values() if row.due_s >= self.warm_up_s]

    def closing_lines(self, counted: str) -> list[str]:
        """What only the client knows of the run, for a person."""
        late_ms = 1e3 * self.lateness_p99_s()
        most_ms = 1e3 * max(self.lateness_s, default=0.0)
        lines = [
            f"sent {self.num_sent}, answered {self.num_done}, aborted {self.num_aborted},"
            f" failed {self.num_failed}, without an end {self.num_running}",
            f"tokens counted by {counted}; times count from when a request was due",
            f"client lateness: P99 {late_ms:.1f} ms, most {most_ms:.1f} ms",
        ]
        for kind, count in self.faults.most_common():
            lines.append(f"failed {count} x {kind}: {self.said[kind][:160]}")
        if late_ms > 1e3 * LATE_S:
            lines.append(
                f"warning: the client itself was late by more than {1e3 * LATE_S:.0f} ms (P99):"
                " its times are too long; give it a core of its own, or send less"
            )
        return lines
