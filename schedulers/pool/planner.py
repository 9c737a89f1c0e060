"""What a pool planner is: requests in, batches for instances out. No clock, no I/O.

Whoever drives it (a simulator, a fleet) tells it of requests and of batches that ran, asks
`due_s` after each event and calls `plan` when that moment has come. Batches of an instance run in
the order in which they were planned; unfinished rows return to the pool by `ran`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..estimators.bilinear import BilinearTime, RefinedTime
from ..estimators.memory import KvMemory
from .memory_rule import MemoryRule
from .offload import Loads
from .request import Batch, PoolRequest, Ran


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSetup:
    """The instances, all alike: KV memory of each, the estimate of its time, most rows of a batch,
    and the slice length S in tokens."""

    instances: int
    memory: KvMemory
    time: BilinearTime
    slice_len: int = 128
    max_rows: int = 512


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Where requests are, and what each instance still has to run by estimate."""

    pooled: int
    sent: int
    loads_s: tuple[float, ...]
    held_pages: tuple[int, ...]


@runtime_checkable
class Planner(Protocol):
    """One planner."""

    def check(self, request: PoolRequest) -> None:
        """Raises ValueError for a request that can never run to its limit."""
        ...

    def arrived(self, request: PoolRequest) -> None:
        """A request that passed `check` joins the pool."""
        ...

    def left(self, number: int) -> None:
        """A request was aborted: it leaves the pool now, or once its batch has run."""
        ...

    def due_s(self, now_s: float) -> float | None:
        """When to plan next, by what is known now; None: after another event."""
        ...

    def plan(self, now_s: float) -> list[Batch]:
        """Batches for instances, in the order in which each is to run its own."""
        ...

    def predict_s(self, batch: Batch, steps: int) -> float:
        """What it expects `batch` to take if it runs so many steps."""
        ...

    def ran(self, batch: Batch, what: Ran) -> None:
        """A batch has run: its load is subtracted, rows that have not ended are pooled again."""
        ...

    def statistics(self) -> PoolStatistics: ...


class BasePlanner:
    """The pool, the loads and the memory rule, shared by all planners."""

    def __init__(self, setup: PoolSetup, rule: MemoryRule, *, slice_len: int, refine: bool = False):
        """Raises ValueError for an estimate under which a batch would get faster as it grows
        longer: batching is not optimal there."""
        self._setup, self._rule, self._slice_len = setup, rule, slice_len
        refined = RefinedTime(setup.time, most_rows=setup.max_rows, steps=slice_len)
        self._refined = refined if refine else None
        self._pool: dict[int, PoolRequest] = {}
        self._sent: dict[int, PoolRequest] = {}
        self._left: set[int] = set()
        self._loads = Loads(setup.instances)
        self._tickets = 0
        self._slices = 0

    @property
    def time(self) -> BilinearTime:
        """The newest estimate."""
        return self._setup.time if self._refined is None else self._refined.time

    def check(self, request: PoolRequest) -> None:
        most = self._most_tokens(request)
        if not self._rule.fits(1, most, 0):
            raise ValueError(
                f"request {request.number}: got {request.prompt_tokens} prompt tokens and"
                f" {request.max_output} to make, for which {most} must fit; allowed:"
                f" {self._rule.memory.num_tokens}, the KV memory of an instance under zeta"
            )

    def _most_tokens(self, request: PoolRequest) -> int:
        """Tokens that must fit at its last slice, which is counted in full."""
        return request.prompt_tokens + request.slices_left(self._slice_len) * self._slice_len

    def arrived(self, request: PoolRequest) -> None:
        self._pool[request.number] = request

    def left(self, number: int) -> None:
        if self._pool.pop(number, None) is None and number in self._sent:
            self._left.add(number)

    def predict_s(self, batch: Batch, steps: int) -> float:
        return self.time.slice_s(len(batch.rows), batch.length, steps)

    def ran(self, batch: Batch, what: Ran) -> None:
        self._loads.subtract(batch.instance, batch.estimate_s)
        if self._refined is not None and what.steps and what.seconds > 0:
            self._refined.observe(len(batch.rows), batch.length, what.steps, what.seconds)
        self._slices += 1
        for number in batch.rows:
            request = self._sent.pop(number)
            request.made += what.made.get(number, 0)
            request.last_ran = self._slices
            if number in what.ended or number in self._left:
                self._left.discard(number)
            else:
                self._pool[number] = request

    def statistics(self) -> PoolStatistics:
        loads = tuple(self._loads.seconds())
        return PoolStatistics(len(self._pool), len(self._sent), loads, self._held_pages())

    def _held_pages(self) -> tuple[int, ...]:
        return (0,) * self._setup.instances

    def _dispatch(
        self,
        instance: int,
        rows: Iterable[PoolRequest],
        *,
        steps: int,
        estimate_s: float,
        prefills: Iterable[PoolRequest],
        drops: tuple[int, ...] = (),
    ) -> Batch:
        """Take `rows` out of the pool and count their batch as load."""
        rows, prefills = tuple(rows), tuple(prefills)
        for request in rows:
            self._sent[request.number] = self._pool.pop(request.number)
        self._loads.add(instance, estimate_s)
        self._tickets += 1
        return Batch(
            ticket=self._tickets,
            instance=instance,
            rows=tuple(request.number for request in rows),
            length=max(request.length for request in rows),
            steps=steps,
            estimate_s=estimate_s,
            prefills=frozenset(request.number for request in prefills),
            prefill_length=max((request.length for request in prefills), default=0),
            drops=drops,
        )
