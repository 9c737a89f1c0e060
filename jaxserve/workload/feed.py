"""When each request of a workload is sent: by its arrival, or when earlier ones have ended.

No clock and no I/O: load client and simulator drive the same object. Requests are read from the
workload as they are needed; loops that wait read ahead only as far as the request they look for.
"""

from collections import Counter, deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final, Protocol

from jaxserve.errors import ConfigError
from jaxserve.workload.work import Work, Workload

LOOPS: Final = ("open", "closed", "sessions")


class Feed:
    """Gives out each request of a workload once, when it is due.

    `loop` open: at its arrival, whatever became of earlier ones. closed: arrivals count for nothing
    but the order; `concurrency` requests are under way, of each client with `per_client`, and the
    next is due when one ends. sessions: the first request of a session at its arrival, each further
    one `think_s` after the end of the one before it, however that ended.

    Raises ConfigError where the loop and what is said beside it contradict each other.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        loop: str = "open",
        concurrency: int = 0,
        per_client: bool = False,
    ):
        check_loop(loop, concurrency, per_client=per_client)
        self._loop: _Loop
        match loop:
            case "open":
                self._loop = _Open(workload)
            case "closed":
                self._loop = _Closed(workload, concurrency, per_client=per_client)
            case _:
                self._loop = _Sessions(workload)

    def next_s(self) -> float | None:
        """When the next request is to be sent; None: not before another one ends, or never."""
        return self._loop.next_s()

    def take(self, now_s: float) -> list[tuple[float, Work]]:
        """All requests due by `now_s`, by the time they were due, and that time."""
        return self._loop.take(now_s)

    def ended(self, work: Work, now_s: float) -> None:
        """A request that was sent has ended, in whatever way."""
        self._loop.ended(work, now_s)

    @property
    def finished(self) -> bool:
        """All requests were given out."""
        return self._loop.finished


def check_loop(loop: str, concurrency: int, *, per_client: bool) -> None:
    """Raises ConfigError unless there is such a loop and `concurrency` is said where it means
    something, and only there."""
    if loop not in LOOPS:
        raise ConfigError(f"loop: got {loop!r}; allowed: {', '.join(LOOPS)}")
    if loop == "closed" and concurrency < 1:
        allowed = "1 or more with loop=closed, which keeps so many requests under way"
        raise ConfigError(f"concurrency: got {concurrency}; allowed: {allowed}")
    if loop != "closed" and concurrency != 0:
        allowed = f"unset with loop={loop}, which sends by arrival; or set loop=closed"
        raise ConfigError(f"concurrency: got {concurrency}; allowed: {allowed}")
    if loop != "closed" and per_client:
        raise ConfigError("per_client: got True; allowed: unset unless loop=closed")


class _Loop(Protocol):
    def next_s(self) -> float | None: ...

    def take(self, now_s: float) -> list[tuple[float, Work]]: ...

    def ended(self, work: Work, now_s: float) -> None: ...

    @property
    def finished(self) -> bool: ...


class _Open:
    def __init__(self, workload: Workload):
        self._rest: Iterator[Work] = workload.requests()
        self._next = next(self._rest, None)

    def next_s(self) -> float | None:
        return None if self._next is None else self._next.arrival_s

    def take(self, now_s: float) -> list[tuple[float, Work]]:
        due = []
        while self._next is not None and self._next.arrival_s <= now_s:
            due.append((self._next.arrival_s, self._next))
            self._next = next(self._rest, None)
        return due

    def ended(self, work: Work, now_s: float) -> None:
        pass

    @property
    def finished(self) -> bool:
        return self._next is None


class _Closed:
    """Free places, each since a time; whose place it is, is "" unless clients have their own.

    How many requests each has is counted ahead: else the workload would be read to its end, and
    kept, to learn that a client has no more.
    """

    def __init__(self, workload: Workload, concurrency: int, *, per_client: bool):
        self._per_client = per_client
        self._rest = workload.requests()
        self._left = (
            Counter(work.client for work in workload.requests())
            if per_client
            else Counter({"": workload.num_requests})
        )
        self._num_left = self._left.total()
        self._read: dict[str, deque[Work]] = {whose: deque() for whose in self._left}
        self._free = [
            (0.0, turn, whose)
            for turn, whose in enumerate(whose for _ in range(concurrency) for whose in self._left)
        ]
        heapify(self._free)
        self._turn = len(self._free)

    def next_s(self) -> float | None:
        while self._free and not self._left[self._free[0][2]]:
            heappop(self._free)
        return self._free[0][0] if self._free else None

    def take(self, now_s: float) -> list[tuple[float, Work]]:
        due = []
        while (next_s := self.next_s()) is not None and next_s <= now_s:
            whose = heappop(self._free)[2]
            due.append((next_s, self._next_of(whose)))
        return due

    def _next_of(self, whose: str) -> Work:
        self._left[whose] -= 1
        self._num_left -= 1
        while not self._read[whose]:
            work = next(self._rest)
            self._read[self._whose(work)].append(work)
        return self._read[whose].popleft()

    def _whose(self, work: Work) -> str:
        return work.client if self._per_client else ""

    def ended(self, work: Work, now_s: float) -> None:
        heappush(self._free, (now_s, self._turn, self._whose(work)))
        self._turn += 1

    @property
    def finished(self) -> bool:
        return self._num_left == 0


class _Sessions:
    """First turns wait for their arrival, later ones for the end of the turn before them.

    Turns are counted ahead, so that a session is known to be over.
    """

    def __init__(self, workload: Workload):
        self._rest = workload.requests()
        turns = Counter(work.session for work in workload.requests())
        alone = turns.pop(None, 0)
        self._num_left = alone + turns.total()
        self._starts_unread = alone + len(turns)
        self._left: dict[str | None, int] = dict(turns)
        self._starts: deque[Work] = deque()
        self._later: dict[str, deque[Work]] = {}
        """Of sessions whose start was read: later turns that were read and not yet due."""
        self._due: list[tuple[float, int, Work]] = []

    def _read(self) -> None:
        work = next(self._rest)
        if work.session is not None and work.session in self._later:
            self._later[work.session].append(work)
            return
        if work.session is not None:
            self._later[work.session] = deque()
        self._starts.append(work)
        self._starts_unread -= 1

    def next_s(self) -> float | None:
        while not self._starts and self._starts_unread:
            self._read()
        times = []
        if self._starts:
            times.append(self._starts[0].arrival_s)
        if self._due:
            times.append(self._due[0][0])
        return min(times, default=None)

    def take(self, now_s: float) -> list[tuple[float, Work]]:
        due = []
        while (next_s := self.next_s()) is not None and next_s <= now_s:
            if self._starts and self._starts[0].arrival_s == next_s:
                work = self._starts.popleft()
            else:
                work = heappop(self._due)[2]
            self._num_left -= 1
            due.append((next_s, work))
        return due

    def ended(self, work: Work, now_s: float) -> None:
        session = work.session
        if session is None:
            return
        self._left[session] -= 1
        if not self._left[session]:
            del self._left[session], self._later[session]
            return
        later = self._later[session]
        while not later:
            self._read()
        turn = later.popleft()
        heappush(self._due, (now_s + (turn.think_s or 0.0), turn.number, turn))

    @property
    def finished(self) -> bool:
        return self._num_left == 0
