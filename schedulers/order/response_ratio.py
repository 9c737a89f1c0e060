"""Highest response ratio next: who waited long, measured by what it asks for, goes first.

The ratio is 1 + waited / uncached. Both are in prompt tokens: what the engine computed, or could
have computed, since the request came; and what it has to compute for it. It changes for everybody
at any time, so nothing is kept sorted: columns are, one number each per waiting request, and
numpy looks for the largest. Knows prompts, pages, and a clock of computed prompt tokens, for which
a subclass may put another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..events import Abort, Admit, Arrive, Enact, Event, Finish, Preempt, RequestNumber
from ..prefix_tree import Cleared, Removed, Stored
from ..waiting_tree import Rank, WaitingTree

FIRST_SIZE: Final = 64


@dataclass(slots=True)
class _Request:
    """`came` is the clock at its arrival; `made` are output tokens, which count as prompt once it
    was preempted; `extend` is what its present admission computes."""

    came: float
    num_prompt_tokens: int
    page_keys: tuple[bytes, ...]
    made: int = 0
    extend: int = 0


class _Columns:
    """Waiting requests in rows without gaps: [N] number, clock on arrival, tokens, uncached."""

    def __init__(self) -> None:
        self._row_of: dict[RequestNumber, int] = {}
        self._numbers = np.zeros(FIRST_SIZE, np.int64)
        self._values = np.zeros((3, FIRST_SIZE))  # came, tokens, uncached

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def numbers(self) -> np.ndarray:
        return self._numbers[: len(self)]

    @property
    def came(self) -> np.ndarray:
        return self._values[0, : len(self)]

    @property
    def uncached(self) -> np.ndarray:
        return self._values[2, : len(self)]

    def add(self, number: RequestNumber, came: float, tokens: int, cached: int) -> None:
        row = len(self)
        if row == len(self._numbers):
            self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)], axis=1)
        self._row_of[number] = row
        self._numbers[row] = number
        self._values[:, row] = came, tokens, tokens - cached

    def remove(self, number: RequestNumber) -> None:
        """The last row takes its place."""
        row, last = self._row_of.pop(number), len(self)
        if row != last:
            moved = self._numbers[row] = self._numbers[last]
            self._values[:, row] = self._values[:, last]
            self._row_of[int(moved)] = row

    def set_cached(self, numbers: list[RequestNumber], cached: int) -> None:
        """All of `numbers` find `cached` tokens cached."""
        rows = [self._row_of[number] for number in numbers]
        self._values[2, rows] = self._values[1, rows] - cached


def _ratios(waited: np.ndarray, uncached: np.ndarray) -> np.ndarray:
    """Response ratios less 1, [N]: the 1 would blur small differences. Nothing uncached: infinite.

    Who came after the clock was last set has not waited.
    """
    ratios = np.full(len(waited), np.inf)
    np.divide(np.maximum(waited, 0.0), uncached, out=ratios, where=uncached > 0)
    return ratios


class ResponseRatio:
    """Base of orders by response ratio, largest first, ties by arrival.

    Waiting starts at arrival, also for preempted requests, so that these do not fall back. Running
    requests stand by the same ratio, the uncached tokens being those that their admission found.
    """

    def __init__(self, *, page_size: int):
        self._page_size = page_size
        self._tree = WaitingTree(on_match=self._matched)
        self._columns = _Columns()
        self._requests: dict[RequestNumber, _Request] = {}
        self._running: dict[RequestNumber, _Request] = {}
        self._clock = 0.0

    def came(self, event: Arrive) -> float:
        """The clock at a request's arrival, in tokens."""
        return self._clock

    def clock_after(self, event: Event) -> float:
        """The clock once `event` has happened, in tokens; it never goes back."""
        if not isinstance(event, Enact):
            return self._clock
        return self._clock + sum(num_prompt for _, num_prompt, _ in event.ran)

    def on(self, event: Event) -> None:
        self._clock = self.clock_after(event)
        match event:
            case Enact(ran=ran):
                for number, _, num_output in ran:
                    self._requests[number].made += num_output
            case Arrive(number=number):
                request = _Request(self.came(event), event.num_prompt_tokens, event.page_keys)
                self._requests[number] = request
                self._queue(number, request, event.num_cached)
            case Admit(number=number, num_extend_tokens=extend):
                self._leave(number)
                request = self._running[number] = self._requests[number]
                request.extend = extend
            case Preempt(number=number, num_cached=num_cached):
                self._queue(number, self._running.pop(number), num_cached)
            case Finish(number=number) | Abort(number=number):
                del self._requests[number]
                if self._running.pop(number, None) is None:
                    self._leave(number)
            case Stored() | Removed() | Cleared():
                self._tree.on(event)
            case _:
                pass

    def next(self) -> RequestNumber | None:
        if not len(self._columns):
            return None
        ratios = self._waiting_ratios()
        # Numbers grow with arrival.
        return int(self._columns.numbers[ratios == ratios.max()].min())

    def waiting(self) -> Iterator[RequestNumber]:
        first = self.next()
        if first is None:
            return
        yield first  # mostly all that is asked for, and cheaper than sorting
        by_ratio = np.lexsort((self._columns.numbers, -self._waiting_ratios()))
        yield from self._columns.numbers[by_ratio[1:]].tolist()

    def running(self) -> list[RequestNumber]:
        """Largest ratio in front, so that the smallest gives way first."""
        ratios = _ratios(
            np.array([self._clock - request.came for request in self._running.values()]),
            np.array([request.extend for request in self._running.values()]),
        )
        stand = zip((-ratios).tolist(), self._running, strict=True)
        return [number for _, number in sorted(stand)]

    def ratios(self) -> dict[RequestNumber, float]:
        """The response ratio of every waiting request."""
        ratios = (1 + self._waiting_ratios()).tolist()
        return dict(zip(self._columns.numbers.tolist(), ratios, strict=True))

    def _waiting_ratios(self) -> np.ndarray:
        return _ratios(self._clock - self._columns.came, self._columns.uncached)

    def _queue(self, number: RequestNumber, request: _Request, num_cached: int) -> None:
        tokens = request.num_prompt_tokens + request.made
        self._columns.add(number, request.came, tokens, num_cached * self._page_size)
        self._tree.add((number,), request.page_keys, num_cached)

    def _leave(self, number: RequestNumber) -> None:
        self._tree.remove((number,))
        self._columns.remove(number)

    def _matched(self, ranks: list[Rank], match: int) -> None:
        self._columns.set_cached([number for (number,) in ranks], match * self._page_size)
