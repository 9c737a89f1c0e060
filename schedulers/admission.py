"""Who fits: may the next waiting request start now, given pages and what is running.

Rules count pages. "Available" is free plus evictable pages; `Candidate.cost_pages` is what the
candidate's prompt would take of them, pages it finds cached and idle included (they can no longer
be evicted). No rule reads a clock or draws a number. Sources: papers.md section 2.6 by name.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

from .estimators.output_length import OutputLength
from .parameters import require
from .peak_memory import PeakMemory


@dataclass(slots=True)
class Running:
    """A running row: tokens it holds, pages it leases, output tokens it may still make and has
    made (`made` of those it holds), and whose request it is of.

    What it holds beyond its pages fits on one more. Never changed once made; not frozen, which
    takes three times as long.
    """

    held: int
    leased_pages: int
    remaining: int
    made: int = 0
    client: str = ""


@dataclass(slots=True)
class Candidate:
    """The next waiting request: prompt tokens (with what it made before a preemption), the pages
    that starting it takes, output tokens each sample may make, its number of samples, whose it is,
    and output tokens made before (`made` of `num_tokens`). Samples that fork share the whole pages
    of their prompt; others have one each among `cost_pages`. Never changed, as `Running`."""

    num_tokens: int
    cost_pages: int
    max_output: int
    num_samples: int
    client: str = ""
    made: int = 0
    forks: bool = True


@dataclass(slots=True)
class Memory:
    """The pool, and the slice length S that leases are cut for. Never changed, as `Running`."""

    page_size: int
    total_pages: int
    available_pages: int
    watermark_pages: int
    slice_steps: int

    def pages(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)


class RunningRows(Sequence[Running]):
    """The rows that run, to which admissions of one plan are added.

    Rules ask for sums over all of them, candidate after candidate: `total` adds only what is new.
    """

    def __init__(self, rows: Iterable[Running] = ()):
        self._read = list(rows)
        self._unread: list[Iterable[Running]] = []
        self._num_unread = 0
        self._totals: dict[Hashable, tuple[int, int]] = {}  # rows counted, and their sum
        self._peaks: dict[Hashable, tuple[int, PeakMemory]] = {}

    def extend(self, rows: Iterable[Running], num_rows: int) -> None:
        """Add `num_rows` rows, which are gone through only when a rule asks for them."""
        self._unread.append(rows)
        self._num_unread += num_rows

    @property
    def _rows(self) -> list[Running]:
        for rows in self._unread:
            self._read += rows
        self._unread.clear()
        self._num_unread = 0
        return self._read

    def total(self, what: Hashable, of: Callable[[Running], int]) -> int:
        """The sum of `of` over the rows; `what` names it, with all that it depends on."""
        rows = self._rows
        counted, total = self._totals.get(what, (0, 0))
        total += sum([of(row) for row in rows[counted:]])
        self._totals[what] = len(rows), total
        return total

    def peak(
        self, what: Hashable, remaining: Callable[[Running], int], *, page_size: int
    ) -> PeakMemory:
        """The most memory of the rows, each making `remaining` more tokens; `what` as above."""
        rows = self._rows
        counted, peak = self._peaks.get(what) or (0, PeakMemory(page_size))
        new = rows[counted:]
        if new:
            peak.join([row.held for row in new], [remaining(row) for row in new])
        self._peaks[what] = len(rows), peak
        return peak

    @overload
    def __getitem__(self, place: int) -> Running: ...

    @overload
    def __getitem__(self, place: slice) -> list[Running]: ...

    def __getitem__(self, place: int | slice) -> Running | list[Running]:
        return self._rows[place]

    def __len__(self) -> int:
        return len(self._read) + self._num_unread


@runtime_checkable
class Admission(Protocol):
    """One rule. While nothing runs its answer depends on the candidate and the memory alone, so
    that what was accepted into the queue is never turned down for good."""

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        """May it start now?"""
        ...

    def ticked(self, steps: int) -> None:
        """A slice of so many steps ran."""
        ...

    def retracted(self, running: RunningRows) -> None:
        """Somebody was preempted; `running` still hold pages."""
        ...

    def finished(self, client: str, num_tokens: int) -> None:
        """A sample ended by itself after so many output tokens."""
        ...


class BaseAdmission:
    """Base of the rules: takes note of nothing."""

    def ticked(self, steps: int) -> None:
        pass

    def retracted(self, running: RunningRows) -> None:
        pass

    def finished(self, client: str, num_tokens: int) -> None:
        pass


def _growth_pages(row: Running, tokens: int, memory: Memory) -> int:
    """Pages a row still needs so that `tokens` more fit, never beyond its own limit."""
    if row.remaining < tokens:
        tokens = row.remaining
    pages = -(-(row.held + tokens) // memory.page_size)
    return pages - row.leased_pages if pages > row.leased_pages else 0


def _sample_growth(candidate: Candidate, tokens: int, memory: Memory) -> int:
    """Pages beyond its prompt that a candidate's samples take for `tokens` tokens each."""
    tokens = min(tokens, candidate.max_output)
    grown = memory.pages(candidate.num_tokens + tokens)
    first = each = grown - memory.pages(candidate.num_tokens)
    if candidate.forks:  # whole pages are shared of all but the last token, which each one runs
        each = grown - (candidate.num_tokens - 1) // memory.page_size
    return first + (candidate.num_samples - 1) * each


def _starts(candidate: Candidate, memory: Memory) -> bool:
    """Its prompt and a token of each sample fit: enough for who has the pool to itself."""
    need = candidate.cost_pages + _sample_growth(candidate, 1, memory)
    return need <= memory.available_pages


class SliceLease(BaseAdmission):
    """Ours: prompt pages, 2 S tokens for every row, and a watermark must fit.

    Preempts only when rows outgrow 2 S ahead; the engine first cuts their limits.
    """

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        ahead = 2 * memory.slice_steps
        need = candidate.cost_pages + _sample_growth(candidate, ahead, memory)
        room = memory.available_pages - memory.watermark_pages - need
        if len(running) * (memory.pages(ahead) + 1) <= room:  # mostly: enough for any rows
            return True
        growth = running.total(
            ("ahead", ahead, memory.page_size), lambda row: _growth_pages(row, ahead, memory)
        )
        return growth <= room


class ReserveMax(BaseAdmission):
    """Held and remaining output of all rows within the whole pool: never preempts.

    In pages and by row, so that a partial page at the end of each row is paid for. Pages that rows
    share count once per row, which is the safe side.
    """

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        rows = running.total(
            ("whole", memory.page_size), lambda row: memory.pages(row.held + row.remaining)
        )
        own = memory.pages(candidate.num_tokens + candidate.max_output) * candidate.num_samples
        return rows + own <= memory.total_pages


class ReserveRemaining(BaseAdmission):
    """What is left to run of everyone must fit into what is available (sgl-project/mini-sglang)."""

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        growth = running.total(
            ("remaining", memory.page_size), lambda row: _growth_pages(row, row.remaining, memory)
        )
        own = candidate.cost_pages + _sample_growth(candidate, candidate.max_output, memory)
        return own + growth <= memory.available_pages


class ReservePrompt(BaseAdmission):
    """The prompt must fit above a watermark; rows that grow may preempt (microsoft/vidur)."""

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        # One token each beyond the prompt: without it a row could be admitted and never step.
        need = candidate.cost_pages + _sample_growth(candidate, 1, memory)
        return memory.available_pages - need >= memory.watermark_pages


@dataclass(frozen=True, slots=True)
class RatioParameters:
    """rho falls from `start` to `start * floor` over `decay_steps` decode steps; outputs count up
    to `clip` tokens."""

    start: float = 0.7
    floor: float = 0.14
    decay_steps: int = 600
    clip: int = 4096

    def __post_init__(self) -> None:
        require(0 < self.start <= 1, "start", self.start, "a number in (0, 1]")
        require(0 <= self.floor <= 1, "floor", self.floor, "a number in [0, 1]")
        for name in ("decay_steps", "clip"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")


class Ratio(BaseAdmission):
    """Reserve `rho * remaining output` for each running row (sgl-project/sglang).

    rho falls linearly, and after a retraction becomes min(1, (decoded + 20 n) / (sum of max_output
    + 1)), falling again from there.
    """

    def __init__(self, parameters: RatioParameters | None = None) -> None:
        self._parameters = parameters or RatioParameters()
        self.rho = self._parameters.start
        self._least = self._parameters.start * self._parameters.floor
        self._fall = (self._parameters.start - self._least) / self._parameters.decay_steps

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        if not running:
            return _starts(candidate, memory)
        growth = running.total(
            ("reserve", self.rho, memory.page_size),
            lambda row: _growth_pages(row, self._reserve(row.remaining), memory),
        )
        own = candidate.cost_pages
        own += _sample_growth(candidate, max(1, self._reserve(candidate.max_output)), memory)
        return own + growth <= memory.available_pages

    def ticked(self, steps: int) -> None:
        self.rho = max(self._least, self.rho - self._fall * steps)

    def retracted(self, running: RunningRows) -> None:
        decoded = sum(row.made for row in running)
        most = sum(row.made + row.remaining for row in running)
        self.rho = min(1.0, (decoded + 20 * len(running)) / (most + 1))

    def _reserve(self, remaining: int) -> int:
        return int(self.rho * min(remaining, self._parameters.clip))


class Peak(BaseAdmission):
    """The most memory that will ever be held at once must fit (ModelTC/lightllm), page-exact.

    With true lengths, and rows that run in step, there are no preemptions. There a prompt runs by
    itself and is counted with the token it yields; here it runs beside the others' next token, and
    so all are counted from now on.
    """

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        peak = running.peak(
            ("most", memory.page_size), lambda row: row.remaining, page_size=memory.page_size
        )
        pages = peak.pages_with(candidate.num_tokens, candidate.max_output, candidate.num_samples)
        return pages <= memory.total_pages


@dataclass(frozen=True, slots=True)
class PastFutureParameters:
    """Outputs are expected to be quantile `u` of the client's last `hist`, plus `slack` tokens.

    Until a client has `min_samples` all clients' count; until there is any, `expect` tokens (0: all
    that a request may make).
    """

    hist: int = 1000
    u: float = 0.7
    min_samples: int = 16
    slack: int = 0
    expect: int = 0

    def __post_init__(self) -> None:
        require(0 < self.u <= 1, "u", self.u, "a number in (0, 1]")
        for name, least in (("hist", 1), ("min_samples", 1), ("slack", 0), ("expect", 0)):
            value = getattr(self, name)
            require(value >= least, name, value, f"{least} or more")
        most = self.hist
        require(self.min_samples <= most, "min_samples", self.min_samples, f"hist={most} at most")


class PastFuture(BaseAdmission):
    """`Peak` with the output lengths that the past lets expect instead of the longest allowed.

    After the Past-Future scheduler (arXiv 2507.10150). Reconstruction: a quantile stands where
    there one is drawn, the history is the client's, and rows and candidate are judged anew at every
    admission.
    """

    def __init__(self, lengths: OutputLength, *, slack: int = 0):
        self._lengths = lengths
        self._slack = slack
        self._heard = 0

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        if not running:
            return _starts(candidate, memory)
        peak = running.peak(
            ("expected", self._heard, memory.page_size),
            lambda row: self._remaining(row.client, row.made, row.remaining),
            page_size=memory.page_size,
        )
        output = self._remaining(candidate.client, candidate.made, candidate.max_output)
        pages = peak.pages_with(candidate.num_tokens, output, candidate.num_samples)
        return pages <= memory.total_pages

    def finished(self, client: str, num_tokens: int) -> None:
        self._lengths.finished(client, num_tokens)
        self._heard += 1

    def _remaining(self, client: str, made: int, most: int) -> int:
        expected = self._lengths.expected(client, made, made + most) - made
        return min(most, expected + self._slack)
