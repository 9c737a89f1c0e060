"""What happened to each request, as its client saw it. Load client and simulator fill it.

Times are seconds from the run's start. Calls for one request come in the order of time.
"""

from collections.abc import Mapping
from typing import Any

from jaxserve.workload.work import Work


class Recorder:
    """Collects a run."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, float, str]] = []

    def sent(self, work: Work, at_s: float) -> None:
        """A request was sent (in an open loop: was due)."""

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        """So many more of its output tokens reached the client, in one message."""

    def ended(self, number: int, at_s: float, reason: str, cached_tokens: int) -> None:
        """It ended: "stop", "length", "abort", "deadline", "error" or "refused"."""
        self.ends.append((number, at_s, reason))

    def slice(
        self,
        replica: int,
        begin_s: float,
        end_s: float,
        *,
        steps: int,
        rows: int,
        prefill_tokens: int,
        output_tokens: int,
        pad_tokens: int = 0,
        invalid_tokens: int = 0,
    ) -> None:
        """A replica's device ran a slice (of a static batch: a batch)."""

    def fairness(
        self,
        replica: int,
        at_s: float,
        *,
        clients: int,
        window_s: float,
        gap: float,
        bound: float | None,
        jain: float | None,
    ) -> None:
        """The service window of a replica's order at a moment (`ServiceMeter.window`)."""

    def replica(self, replica: int, statistics: Mapping[str, Any]) -> None:
        """A replica's counters at the end of the run (`EngineStatistics.values` and the like)."""
