"""A recorder's calls joined into one row a request and one row a delivery. Knows no metric.

Dimension key: R requests  M messages (deliveries)
"""

from dataclasses import dataclass

import numpy as np

from jaxserve.report.recorder import REASONS, UNFINISHED, Recorder


@dataclass(frozen=True, slots=True)
class RequestTable:
    """Requests in the order of their numbers, and their deliveries, request by request.

    What did not happen is nan. `reason_R` is a place in `REASONS`, or `UNFINISHED`; `client_R` one
    in the recorder's `client_names`. `gap_M` is the time since the message before it of the same
    request, nan for a first message. `num_strange` deliveries and ends are of requests that were
    never sent; they are left out.
    """

    number_R: np.ndarray
    client_R: np.ndarray
    sent_R: np.ndarray
    prompt_R: np.ndarray
    cached_R: np.ndarray
    output_R: np.ndarray
    messages_R: np.ndarray
    first_R: np.ndarray
    last_R: np.ndarray
    end_R: np.ndarray
    reason_R: np.ndarray
    queue_R: np.ndarray
    replica_R: np.ndarray
    request_M: np.ndarray
    time_M: np.ndarray
    tokens_M: np.ndarray
    gap_M: np.ndarray
    num_strange: int

    def __len__(self) -> int:
        return len(self.number_R)

    @property
    def completed_R(self) -> np.ndarray:
        """Answers that are whole."""
        return (self.reason_R == REASONS.index("stop")) | (self.reason_R == REASONS.index("length"))

    @property
    def ttft_R(self) -> np.ndarray:
        # A delivery's time is rounded to a microsecond, its sending is not.
        return np.maximum(self.first_R - self.sent_R, 0.0)

    @property
    def e2e_R(self) -> np.ndarray:
        return np.maximum(self.last_R - self.sent_R, 0.0)

    @property
    def tpot_R(self) -> np.ndarray:
        """nan for requests of one output token."""
        further = np.where(self.output_R > 1, self.output_R - 1.0, np.nan)
        return (self.last_R - self.first_R) / further

    @property
    def left_R(self) -> np.ndarray:
        """When each request was over; for those that never ended, infinity."""
        return np.where(np.isnan(self.end_R), np.inf, self.end_R)

    @property
    def end_s(self) -> float:
        """When the last thing happened."""
        times = np.concatenate([self.sent_R, self.end_R, self.time_M])
        return float(np.nanmax(times)) if len(times) else 0.0


def join(recorder: Recorder) -> RequestTable:
    """The calls so far. A number that was sent twice counts as its last sending."""
    sent = recorder.sent_columns()
    numbers, last = np.unique(sent["number"][::-1], return_index=True)
    sent = {name: column[::-1][last] for name, column in sent.items()}
    num = len(numbers)
    strange = 0

    def rows_of(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of each number, and whether it was ever sent."""
        rows = np.minimum(np.searchsorted(numbers, wanted), max(num - 1, 0))
        return rows, numbers[rows] == wanted if num else np.zeros(len(wanted), bool)

    ended = recorder.ended_columns()
    rows, known = rows_of(ended["number"])
    strange += int((~known).sum())
    rows = rows[known]

    def at_end(name: str, missing: float | int, dtype: type) -> np.ndarray:
        column = np.full(num, missing, dtype)
        column[rows] = ended[name][known]
        return column

    number_M, time_M, tokens_M = recorder.delivered_columns()
    request_M, known_M = rows_of(number_M.astype(np.int64))
    strange += int((~known_M).sum())
    if not known_M.all():
        request_M, time_M, tokens_M = request_M[known_M], time_M[known_M], tokens_M[known_M]
    order = np.argsort(request_M.astype(np.int32), kind="stable")
    request_M, time_M, tokens_M = request_M[order].astype(np.int32), time_M[order], tokens_M[order]
    messages = np.bincount(request_M, minlength=num)
    starts = np.cumsum(messages) - messages
    some = messages > 0
    first, final = np.full(num, np.nan), np.full(num, np.nan)
    first[some] = time_M[starts[some]]
    final[some] = time_M[starts[some] + messages[some] - 1]
    gap_M = np.diff(time_M, prepend=np.nan)
    gap_M[starts[some]] = np.nan
    return RequestTable(
        number_R=numbers,
        client_R=sent["client"],
        sent_R=sent["at_s"],
        prompt_R=sent["prompt"],
        cached_R=at_end("cached", 0, np.int64),
        output_R=np.bincount(request_M, tokens_M, num).astype(np.int64),
        messages_R=messages,
        first_R=first,
        last_R=final,
        end_R=at_end("at_s", np.nan, np.float64),
        reason_R=at_end("reason", UNFINISHED, np.int8),
        queue_R=at_end("queue", np.nan, np.float64),
        replica_R=at_end("replica", -1, np.int64),
        request_M=request_M,
        time_M=time_M,
        tokens_M=tokens_M,
        gap_M=gap_M,
        num_strange=strange,
    )
