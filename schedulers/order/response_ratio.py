"""Highest response ratio next: who waited long, measured by what it asks for, goes first.

The ratio is 1 + waited / (fixed + uncached). All are in prompt tokens: what the engine computed,
or could have computed, since the request came; what any prefill costs beside its tokens; and what
the engine has to compute for this one. It changes for everybody whenever the clock moves, so
nothing is kept sorted: columns are, one number each per waiting request, and after a move of the
clock numpy looks for the largest ratios, many at once. Until the clock moves again the others stay
behind these, and only who comes or finds another match is looked at. Knows prompts, pages, and a
clock of computed prompt tokens, for which a subclass may put another; a subclass may also rank
those who wait by something else for a while.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from ..events import Abort, Admit, Arrive, Enact, Event, Finish, Preempt, RequestNumber, Takes, Tick
from ..prompt_tree import Home, Node, PromptTree
from ..ranking import Ranking

FIRST_SIZE: Final = 64

Key = tuple[float, RequestNumber]
"""How a request stands: its rank, and its number, which grows with arrival."""

NOBODY: Final = (-math.inf, -1)
EVERYBODY: Final = (math.inf, 0)


@dataclass(slots=True)
class _Request:
    """`came` is the clock at its arrival; `made` are output tokens, which count as prompt once it
    was preempted."""

    came: float
    num_prompt_tokens: int
    page_keys: tuple[bytes, ...]
    made: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.made


class _Rows:
    """Requests in rows without gaps: [N] number, clock on arrival, tokens, and the home's place."""

    def __init__(self) -> None:
        self.row_of: dict[RequestNumber, int] = {}
        self._numbers = np.zeros(FIRST_SIZE, np.int64)
        self._came = np.zeros(FIRST_SIZE)
        self._tokens = np.zeros(FIRST_SIZE)
        self._places = np.zeros(FIRST_SIZE, np.intp)

    def __len__(self) -> int:
        return len(self.row_of)

    @property
    def numbers(self) -> np.ndarray:
        return self._numbers[: len(self)]

    @property
    def came(self) -> np.ndarray:
        return self._came[: len(self)]

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: len(self)]

    @property
    def places(self) -> np.ndarray:
        return self._places[: len(self)]

    def add(self, number: RequestNumber, came: float, tokens: int) -> None:
        row = len(self)
        if row == len(self._numbers):
            self._numbers, self._came = _doubled(self._numbers), _doubled(self._came)
            self._tokens, self._places = _doubled(self._tokens), _doubled(self._places)
        self.row_of[number] = row
        self._numbers[row], self._came[row], self._tokens[row] = number, came, tokens

    def remove(self, number: RequestNumber) -> None:
        """The last row takes its place."""
        row, last = self.row_of.pop(number), len(self)
        if row != last:
            for column in (self._numbers, self._came, self._tokens, self._places):
                column[row] = column[last]
            self.row_of[int(self._numbers[row])] = row


class _Home(Home):
    """Requests whose rows have the number `place`."""

    __slots__ = ("place",)
    place: int


class _Matches(PromptTree[_Home]):
    """How many tokens of each waiting prompt are cached: `cached[rows.places]`.

    A row has the place of its home, so that a change of the cache writes a number per home.
    """

    def __init__(self, rows: _Rows, page_size: int):
        self._rows, self._page_size = rows, page_size
        self.cached = np.zeros(FIRST_SIZE)
        self._free = list(range(FIRST_SIZE))
        self._changed: set[int] = set()  # places of homes whose match may have
        self._moved: set[RequestNumber] = set()  # to another home, with its match
        super().__init__()

    @property
    def is_changed(self) -> bool:
        """Whether anybody's match may have changed since the rows were last asked for."""
        return bool(self._changed or self._moved)

    def changed_rows(self) -> np.ndarray:
        """Rows of requests whose match may have changed since this was last asked."""
        is_changed = np.zeros(len(self.cached), bool)
        is_changed[list(self._changed)] = True
        is_row_changed = is_changed[self._rows.places]
        row_of = self._rows.row_of
        is_row_changed[[row_of[number] for number in self._moved if number in row_of]] = True
        self._changed.clear()
        self._moved.clear()
        return np.flatnonzero(is_row_changed)

    def _make_home(self, node: Node, above: _Home | None) -> _Home:
        home = _Home(node, above)
        if not self._free:
            self._free = list(range(len(self.cached), 2 * len(self.cached)))
            self.cached = _doubled(self.cached)
        home.place = self._free.pop()
        self.cached[home.place] = home.match * self._page_size
        return home

    def _moving_up(self, home: _Home) -> None:
        rows = self._rows
        self._moved.update(rows.numbers[rows.places == home.place].tolist())

    def _unmake_home(self, home: _Home) -> None:
        self._free.append(home.place)

    def _enter(self, home: _Home, rank: RequestNumber, lane: str) -> None:
        self._rows.places[self._rows.row_of[rank]] = home.place

    def _leave(self, home: _Home, rank: RequestNumber, lane: str) -> None:
        pass  # its row goes, or gets another place

    def _rematched(self, home: _Home, before: int) -> None:
        self.cached[home.place] = home.match * self._page_size
        self._changed.add(home.place)


class ResponseRatio:
    """Base of orders by response ratio, largest first, ties by arrival.

    `fixed_tokens` are added to everybody's uncached tokens, 0 or more. Without them who has nothing
    to compute goes first. Waiting starts at arrival, also for preempted requests, so that these do
    not fall back. Running requests stand by the same ratio, the uncached tokens being those that
    their admission found.
    """

    num_chosen: ClassVar[int] = 64
    """How many with the smallest ranks are looked for at once."""

    def __init__(self, *, page_size: int, fixed_tokens: float = 0.0):
        self._page_size, self._fixed_tokens = page_size, fixed_tokens
        self._waiting, self._running = _Rows(), _Rows()
        self._matches = _Matches(self._waiting, page_size)
        self._requests: dict[RequestNumber, _Request] = {}
        self._clock = 0.0
        # Those of `_chosen` wait, and all others who wait stand behind `_last`.
        self._chosen: Ranking[Key, RequestNumber] = Ranking()
        self._key_of: dict[RequestNumber, Key] = {}
        self._last: Key = NOBODY
        self._sorted: list[RequestNumber] | None = None  # who runs, until something happens
        self._takes: Takes = {
            Arrive: self._arrive,
            Admit: self._admit,
            Enact: self._enact,
            Tick: self._tick,
            Preempt: self._preempt,
            Finish: self._end,
            Abort: self._end,
            **self._matches.takes,
        }

    def came(self, event: Arrive) -> float:
        """The clock at a request's arrival, in tokens."""
        return self._clock

    def clock_after(self, event: Enact | Tick) -> float:
        """The clock once `event` has happened, in tokens; it never goes back."""
        if isinstance(event, Tick):
            return self._clock
        return self._clock + sum([num_prompt for _, num_prompt, _ in event.ran])

    def ranks(self) -> np.ndarray:
        """Where all who wait stand, [N] by row, the smallest first: by ratio."""
        return -self._waiting_ratios()

    def rank(self, number: RequestNumber) -> float:
        """The same number of one who waits."""
        request = self._requests[number]
        uncached = request.num_tokens - self._matches.match(number) * self._page_size
        cost = uncached + self._fixed_tokens
        return -max(0.0, self._clock - request.came) / cost if cost > 0 else -math.inf

    def on(self, event: Event) -> None:
        take = self._takes.get(type(event))
        if take is not None:
            take(event)

    def next(self) -> RequestNumber | None:
        self._settle()
        return self._chosen.least()[1] if self._chosen else None

    def waiting(self) -> Iterator[RequestNumber]:
        self._settle()
        for _, number in self._chosen.ascending():
            yield number
        if len(self._chosen) < len(self._waiting):
            for number in _sorted(self._waiting.numbers, self.ranks()):
                if number not in self._key_of:
                    yield number

    def running(self) -> list[RequestNumber]:
        """Largest ratio in front, so that the smallest gives way first."""
        if self._sorted is None:
            rows = self._running
            costs = rows.tokens + self._fixed_tokens
            self._sorted = _sorted(rows.numbers, -_ratios(self._clock - rows.came, costs))
        return list(self._sorted)

    def ratios(self) -> dict[RequestNumber, float]:
        """The response ratio of every waiting request."""
        ratios = (1 + self._waiting_ratios()).tolist()
        return dict(zip(self._waiting.numbers.tolist(), ratios, strict=True))

    def _waiting_ratios(self) -> np.ndarray:
        rows = self._waiting
        uncached = rows.tokens - self._matches.cached[rows.places]
        return _ratios(self._clock - rows.came, uncached + self._fixed_tokens)

    # Requests.

    def _arrive(self, event: Arrive) -> None:
        request = _Request(self.came(event), event.num_prompt_tokens, event.page_keys)
        self._requests[event.number] = request
        self._queue(event.number, request, event.num_cached)

    def _admit(self, event: Admit) -> None:
        number = event.number
        self._leave(number)
        self._running.add(number, self._requests[number].came, event.num_extend_tokens)
        self._sorted = None

    def _enact(self, event: Enact) -> None:
        self._set_clock(self.clock_after(event))
        requests = self._requests
        for number, _, num_output in event.ran:
            requests[number].made += num_output

    def _tick(self, event: Tick) -> None:
        self._set_clock(self.clock_after(event))

    def _preempt(self, event: Preempt) -> None:
        self._stop(event.number)
        self._queue(event.number, self._requests[event.number], event.num_cached)

    def _end(self, event: Finish | Abort) -> None:
        number = event.number
        if number in self._running.row_of:
            self._stop(number)
        else:
            self._leave(number)
        del self._requests[number]

    def _queue(self, number: RequestNumber, request: _Request, num_cached: int) -> None:
        self._waiting.add(number, request.came, request.num_tokens)
        self._matches.add(number, request.page_keys, num_cached)
        self._place(number)

    def _leave(self, number: RequestNumber) -> None:
        self._matches.remove(number)
        self._waiting.remove(number)
        self._drop(number)

    def _stop(self, number: RequestNumber) -> None:
        self._running.remove(number)
        self._sorted = None

    def _set_clock(self, clock: float) -> None:
        if clock != self._clock:
            self._clock = clock
            self._sorted = None
            self._forget()

    # Who goes first.

    def _settle(self) -> None:
        """Have the first one chosen, if anybody waits."""
        if self._matches.is_changed:
            self._place_anew()
        if not self._chosen:
            self._choose()

    def _place_anew(self) -> None:
        rows = self._matches.changed_rows()
        if len(rows) > self.num_chosen:
            self._forget()
            return
        for number in self._waiting.numbers[rows].tolist():
            self._drop(number)
            self._place(number)

    def _choose(self) -> None:
        numbers, ranks, most = self._waiting.numbers, self.ranks(), self.num_chosen
        if len(numbers) > most:
            chosen = _smallest(numbers, ranks, most)
            numbers, ranks = numbers[chosen], ranks[chosen]
        keys = sorted(zip(ranks.tolist(), numbers.tolist(), strict=True))
        self._key_of = {key[1]: key for key in keys}
        self._chosen = Ranking.of({key: key[1] for key in keys})
        self._last = keys[-1] if len(keys) < len(self._waiting) else EVERYBODY

    def _place(self, number: RequestNumber) -> None:
        """Let a request stand among the chosen, unless it is behind them."""
        key = (self.rank(number), number)
        if key <= self._last:
            self._key_of[number] = key
            self._chosen.put(key, number)

    def _drop(self, number: RequestNumber) -> None:
        key = self._key_of.pop(number, None)
        if key is not None:
            del self._chosen[key]

    def _forget(self) -> None:
        self._chosen, self._key_of, self._last = Ranking(), {}, NOBODY


def _ratios(waited: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Response ratios less 1, [N]: the 1 would blur small differences. Where nothing is to be
    computed, and that costs nothing: infinite.

    Who came after the clock was last set has not waited.
    """
    ratios = np.full(len(waited), np.inf)
    np.divide(np.maximum(waited, 0.0), costs, out=ratios, where=costs > 0)
    return ratios


def _smallest(numbers: np.ndarray, ranks: np.ndarray, most: int) -> np.ndarray:
    """Where the `most` smallest ranks are, the smallest numbers of equal ones; `most` < N."""
    largest = np.partition(ranks, most - 1)[most - 1]
    smaller, equal = np.flatnonzero(ranks < largest), np.flatnonzero(ranks == largest)
    left = most - len(smaller)
    if left < len(equal):
        equal = equal[np.argpartition(numbers[equal], left)[:left]]
    return np.concatenate([smaller, equal])


def _sorted(numbers: np.ndarray, ranks: np.ndarray) -> list[RequestNumber]:
    return numbers[np.lexsort((numbers, ranks))].tolist()


def _doubled(column: np.ndarray) -> np.ndarray:
    return np.concatenate([column, np.zeros_like(column)])
