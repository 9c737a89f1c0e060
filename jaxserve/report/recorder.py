"""What happened to each request, as its client saw it. Load client and simulator fill it.

Times are seconds from the run's start. Calls for one request come in the order of time. Knows no
metric: `measure.py` makes the report of what is kept here.

A simulator delivers ten million times, so a call does no more than put its numbers on a list. Full
lists become columns: 12 bytes a delivery (its time to a microsecond), 54 bytes a request.
"""

from array import array
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from jaxserve.report.fairness_log import FairnessLog
from jaxserve.report.slice_log import SliceLog
from jaxserve.workload.work import Work

REASONS: Final = ("stop", "length", "abort", "deadline", "error", "refused")
"""How a request ends; the first two are those of an answer that is whole."""
UNFINISHED: Final = -1
"""The place in `REASONS` of a request that never ended."""
KEEP_SLICES: Final = 100_000
_PENDING: Final = 3 * 2**16
_PENDING_ROWS: Final = 2**12
# A delivery's time in microseconds and its tokens share 64 bits: 51 days, 4 million tokens.
_TOKEN_BITS: Final = 22
_TICKS_PER_S: Final = 1e6


class Recorder:
    """Collects a run.

    With `keep_rows` the report has a row for each request. Of the slices, totals and series are
    kept always, and the first `keep_slices` one by one, for the Chrome trace. Raises ValueError for
    a reason that is not in `REASONS`.
    """

    def __init__(self, *, keep_rows: bool = True, keep_slices: int = KEEP_SLICES) -> None:
        self.keep_rows = keep_rows
        self.slices = SliceLog(keep_slices)
        self.fairness_log = FairnessLog()
        self.replicas: dict[int, dict[str, Any]] = {}
        self.client_names: list[str] = []
        self.client_weights = array("d")
        self._client_ids: dict[str, int] = {}
        self._pending: list[float | int] = []
        self._delivered: list[tuple[np.ndarray, np.ndarray]] = []
        self._sent = _Columns(number="q", at_s="d", prompt="i", client="i")
        self._ended = _Columns(number="q", at_s="d", cached="i", reason="b", replica="i", queue="f")

    # What load client and simulator call.

    def sent(self, work: Work, at_s: float) -> None:
        """A request was sent (in an open loop: was due)."""
        client = self._client_ids.get(work.client)
        if client is None:
            client = self._client_ids[work.client] = len(self.client_names)
            self.client_names.append(work.client)
            self.client_weights.append(work.weight)
        self._sent.append(work.number, at_s, work.prompt_tokens, client)

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        """So many more of its output tokens reached the client, in one message."""
        pending = self._pending
        pending += (number, at_s, num_tokens)
        if len(pending) >= _PENDING:
            self._pack()

    def ended(
        self,
        number: int,
        at_s: float,
        reason: str,
        cached_tokens: int,
        *,
        replica: int | None = None,
        queue_s: float | None = None,
    ) -> None:
        """It ended: "stop", "length", "abort", "deadline", "error" or "refused".

        Where they are known: the replica that ran it, and how long it waited there for its first
        slice.
        """
        self._ended.append(
            number,
            at_s,
            cached_tokens,
            REASONS.index(reason),
            -1 if replica is None else replica,
            float("nan") if queue_s is None else queue_s,
        )

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
        self.slices.add(
            (
                replica,
                begin_s,
                end_s,
                steps,
                rows,
                prefill_tokens,
                output_tokens,
                pad_tokens,
                invalid_tokens,
            )
        )

    def fairness(
        self,
        replica: int,
        at_s: float,
        *,
        clients: int,
        window_s: float | int,
        gap: float | int,
        bound: float | int | None,
        jain: float | int | None,
    ) -> None:
        """The service window of a replica's order at a moment (`ServiceMeter.window`)."""
        self.fairness_log.add(replica, at_s, clients, window_s, gap, bound, jain)

    def replica(self, replica: int, statistics: Mapping[str, Any]) -> None:
        """A replica's counters at the end of the run (`EngineStatistics.values` and the like)."""
        self.replicas[replica] = dict(statistics)

    # What the report reads.

    @property
    def num_sent(self) -> int:
        return len(self._sent)

    @property
    def ends(self) -> list[tuple[int, float, str]]:
        """(number, time, reason) of each request that ended, in the order of the calls."""
        columns = self._ended.arrays()
        rows = zip(columns["number"], columns["at_s"], columns["reason"], strict=True)
        return [(int(number), float(at_s), REASONS[reason]) for number, at_s, reason in rows]

    def sent_columns(self) -> dict[str, np.ndarray]:
        """number, at_s, prompt, client (its place in `client_names`) of each request sent."""
        return self._sent.arrays()

    def ended_columns(self) -> dict[str, np.ndarray]:
        """number, at_s, cached, reason (in `REASONS`), replica (or -1), queue (or nan)."""
        return self._ended.arrays()

    def delivered_columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """number, time in seconds and tokens of each delivery, in the order of the calls."""
        self._pack()
        if not self._delivered:
            return np.zeros(0, np.uint32), np.zeros(0), np.zeros(0, np.int32)
        numbers = np.concatenate([number for number, _ in self._delivered])
        words = np.concatenate([word for _, word in self._delivered])
        tokens = (words & (2**_TOKEN_BITS - 1)).astype(np.int32)
        return numbers, (words >> _TOKEN_BITS) / _TICKS_PER_S, tokens

    def _pack(self) -> None:
        if not self._pending:
            return
        table = np.fromiter(self._pending, np.float64, len(self._pending)).reshape(-1, 3)
        self._pending.clear()
        ticks = np.rint(table[:, 1] * _TICKS_PER_S).astype(np.uint64)
        words = (ticks << np.uint64(_TOKEN_BITS)) | table[:, 2].astype(np.uint64)
        self._delivered.append((table[:, 0].astype(np.uint32), words))


class _Columns:
    """Rows, kept by column: each of its own type code (see `array`)."""

    def __init__(self, **codes: str):
        self._arrays = {name: array(code) for name, code in codes.items()}
        self._rows: list[tuple[float | int, ...]] = []  # not in columns yet

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values()))) + len(self._rows)

    def append(self, *values: float | int) -> None:
        self._rows.append(values)
        if len(self._rows) >= _PENDING_ROWS:
            self._pack()

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True)
        for column, values in zip(self._arrays.values(), columns, strict=bool(self._rows)):
            column.extend(values)  # type: ignore[arg-type]
        self._rows.clear()

    def arrays(self) -> dict[str, np.ndarray]:
        self._pack()
        # Copies: an array that shares its memory could not grow any more.
        return {name: np.array(column) for name, column in self._arrays.items()}
