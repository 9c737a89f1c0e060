"""Who fits: may the next waiting request start now, given pages and what is running.

Rules count pages. "Available" is free plus evictable pages; `Candidate.cost_pages` is what the
candidate's prompt would take of them, pages it finds cached and idle included (they can no longer
be evicted). No rule reads a clock or draws a number. Sources: papers.md section 2.6 by name.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, overload, runtime_checkable


@dataclass(frozen=True, slots=True)
class Running:
    """A running row: tokens it holds, pages it leases, output tokens it may still make and has
    made (`made` of those it holds)."""

    held: int
    leased_pages: int
    remaining: int
    made: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """The next waiting request: prompt tokens (with what it made before a preemption), the pages
    that starting it takes, output tokens each sample may make, and its number of samples."""

    num_tokens: int
    cost_pages: int
    max_output: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The pool, and the slice length S that leases are cut for."""

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
        self._rows = list(rows)
        self._totals: dict[Hashable, tuple[int, int]] = {}  # rows counted, and their sum

    def append(self, row: Running) -> None:
        self._rows.append(row)

    def total(self, what: Hashable, of: Callable[[Running], int]) -> int:
        """The sum of `of` over the rows; `what` names it, with all that it depends on."""
        counted, total = self._totals.get(what, (0, 0))
        total += sum(of(row) for row in self._rows[counted:])
        self._totals[what] = len(self._rows), total
        return total

    @overload
    def __getitem__(self, place: int) -> Running: ...

    @overload
    def __getitem__(self, place: slice) -> list[Running]: ...

    def __getitem__(self, place: int | slice) -> Running | list[Running]:
        return self._rows[place]

    def __len__(self) -> int:
        return len(self._rows)


@runtime_checkable
class Admission(Protocol):
    """One rule. `ticked` and `retracted` tell it of slices run, and of a preemption with
    the rows that still hold pages."""

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool: ...

    def ticked(self, steps: int) -> None: ...

    def retracted(self, running: RunningRows) -> None: ...


class StatelessAdmission:
    """Base of the rules that remember nothing."""

    def ticked(self, steps: int) -> None:
        pass

    def retracted(self, running: RunningRows) -> None:
        pass


def _growth_pages(row: Running, tokens: int, memory: Memory) -> int:
    """Pages a row still needs so that `tokens` more fit, never beyond its own limit."""
    return max(0, memory.pages(row.held + min(tokens, row.remaining)) - row.leased_pages)


def _sample_growth(candidate: Candidate, tokens: int, memory: Memory) -> int:
    """Pages beyond its prompt that a candidate's samples take for `tokens` tokens each."""
    tokens = min(tokens, candidate.max_output)
    first = memory.pages(candidate.num_tokens + tokens) - memory.pages(candidate.num_tokens)
    # Samples share whole prompt pages only: each further one has its own partial page.
    whole = candidate.num_tokens // memory.page_size
    each = memory.pages(candidate.num_tokens + tokens) - whole
    return first + (candidate.num_samples - 1) * each


class SliceLease(StatelessAdmission):
    """Ours: prompt pages, 2 S tokens for every row, and a watermark must fit.

    Preempts only when rows outgrow 2 S ahead; the engine first cuts their limits.
    """

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        ahead = 2 * memory.slice_steps
        growth = running.total(
            ("ahead", ahead, memory.page_size), lambda row: _growth_pages(row, ahead, memory)
        )
        need = candidate.cost_pages + _sample_growth(candidate, ahead, memory)
        return need + growth + memory.watermark_pages <= memory.available_pages


class ReserveMax(StatelessAdmission):
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


class ReserveRemaining(StatelessAdmission):
    """What is left to run of everyone must fit into what is available (sgl-project/mini-sglang)."""

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        growth = running.total(
            ("remaining", memory.page_size), lambda row: _growth_pages(row, row.remaining, memory)
        )
        own = candidate.cost_pages + _sample_growth(candidate, candidate.max_output, memory)
        return own + growth <= memory.available_pages


class ReservePrompt(StatelessAdmission):
    """The prompt must fit above a watermark; rows that grow may preempt (microsoft/vidur)."""

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        # One token each beyond the prompt: without it a row could be admitted and never step.
        need = candidate.cost_pages + _sample_growth(candidate, 1, memory)
        return memory.available_pages - need >= memory.watermark_pages


class Ratio:
    """Reserve `rho * remaining output` for each running row (sgl-project/sglang).

    rho falls linearly from `start` to `start * floor` over `decay_steps` decode steps, and after a
    retraction becomes min(1, (decoded + 20 n) / (sum of max_output + 1)), falling again from there.
    """

    clip = 4096
    start = 0.7
    floor = 0.14
    decay_steps = 600

    def __init__(self) -> None:
        self.rho = self.start
        self._fall = self.start * (1 - self.floor) / self.decay_steps

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        growth = running.total(
            ("reserve", self.rho, memory.page_size),
            lambda row: _growth_pages(row, self._reserve(row.remaining), memory),
        )
        own = candidate.cost_pages
        own += _sample_growth(candidate, max(1, self._reserve(candidate.max_output)), memory)
        return own + growth <= memory.available_pages

    def ticked(self, steps: int) -> None:
        self.rho = max(self.start * self.floor, self.rho - self._fall * steps)

    def retracted(self, running: RunningRows) -> None:
        decoded = sum(row.made for row in running)
        most = sum(row.made + row.remaining for row in running)
        self.rho = min(1.0, (decoded + 20 * len(running)) / (most + 1))

    def _reserve(self, remaining: int) -> int:
        return int(self.rho * min(remaining, self.clip))


class Peak(StatelessAdmission):
    """The most memory that will ever be held at once must fit (ModelTC/lightllm), page-exact.

    When the request with the k-th longest remaining output ends, the first k are alive and each has
    grown by that much. With true lengths there are no preemptions.
    """

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        rows = [(row.held, row.remaining) for row in running]
        # The prefill yields one token: it is held, and one less remains.
        start = (candidate.num_tokens + 1, candidate.max_output - 1)
        rows += [start] * candidate.num_samples
        return peak_pages(rows, memory.page_size) <= memory.total_pages


def peak_pages(rows: Sequence[tuple[int, int]], page_size: int) -> int:
    """Most pages held at once by rows (tokens held, tokens remaining) that all run to their end."""
    rows = sorted(rows, key=lambda row: -row[1])
    peak = 0
    for k, (_, steps) in enumerate(rows):
        if k + 1 < len(rows) and rows[k + 1][1] == steps:
            continue  # ends that tie are counted once, with all of them alive
        peak = max(peak, sum(-(-(held + steps) // page_size) for held, _ in rows[: k + 1]))
    return peak


ADMISSIONS: Mapping[str, Callable[[], Admission]] = MappingProxyType(
    {
        "slice_lease": SliceLease,
        "reserve_max": ReserveMax,
        "reserve_remaining": ReserveRemaining,
        "reserve_prompt": ReservePrompt,
        "ratio": Ratio,
        "peak": Peak,
    }
)
