"""Lets waiting requests in: who the order names gets slots and leases, if admission agrees.

Stops at the first that does not fit, so that nobody is passed by for being large, unless the order
names another one. Knows slots, leases and the budget of prompt tokens; what is run of whom in a
slice is for the planner.
"""

import heapq
from itertools import chain, repeat
from typing import Protocol, runtime_checkable

from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.prefixes import Prefixes
from jaxserve.engine.sequence import Job, Phase, Sequence
from jaxserve.engine.statistics import EngineStatistics
from jaxserve.schedulers.admission import Admission, Candidate, Memory, Running, RunningRows
from jaxserve.schedulers.events import Admit, Misfit
from jaxserve.schedulers.order import Order
from jaxserve.schedulers.pages import Granted, PagePool


@runtime_checkable
class Core(Protocol):
    """What is seen of the engine core here."""

    config: CoreConfig
    pool: PagePool
    prefixes: Prefixes
    order: Order
    admission: Admission
    jobs: dict[int, Job]
    statistics_now: EngineStatistics

    @property
    def num_in_flight(self) -> int: ...

    def outgrown(self, job: Job) -> None: ...


class Admitter:
    """The admitting part of `EngineCore`; it owns the row slots.

    `blocked` says that memory kept somebody out when last tried.
    """

    def __init__(self, core: Core):
        self._core, self._config, self._pool = core, core.config, core.pool
        self._free_slots = list(range(core.config.scheduler.max_rows))
        self.blocked = False
        self._admitted_per_s = 1.0
        self._last_admission_s = 0.0

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def give_slot(self, row: Sequence) -> None:
        """The row's slot is free for a later slice."""
        if row.slot >= 0:
            heapq.heappush(self._free_slots, row.slot)
        row.slot = -1

    def drain_time_s(self, now_s: float) -> float:
        """When a full queue may have a place: one admission, or the silence since the last."""
        silence = now_s - self._last_admission_s
        return min(60.0, max(1.0, 1 / self._admitted_per_s, silence))

    def memory(self, available_pages: int, slice_steps: int) -> Memory:
        return Memory(
            page_size=self._pool.page_size,
            total_pages=self._pool.num_pages,
            available_pages=available_pages,
            watermark_pages=self._config.scheduler.watermark_pages,
            slice_steps=slice_steps,
        )

    def running_rows(self, running: list[Job]) -> RunningRows:
        """Every row that holds a lease, or will share its parent's, as admission rules see it."""
        leased = [row for job in running for row in job.sequences if row.lease is not None]
        rows = RunningRows()
        rows.extend(map(_as_running, leased), len(leased))
        for job in running:
            if job.parent is not None:
                self._add_unforked(rows, job)
        return rows

    def _add_unforked(self, rows: RunningRows, job: Job) -> None:
        """Samples that hold their prompt together: the first all of the parent's lease, the others,
        which run the prompt's last token on a page of their own, its whole pages."""
        assert job.parent is not None
        if job.parent.lease is None:
            return
        first = len(job.parent.lease.pages)
        others = min(first, (job.request.prompt.size - 1) // self._pool.page_size)
        pages = chain([first], repeat(others))
        rows.extend(map(_as_running, job.sequences, pages), len(job.sequences))

    def admit(self, running: list[Job], steps: int, *, budget: int, now_s: float) -> list[Job]:
        """Seat whom the order names until it names nobody beside those that do not fit, or
        `budget` prompt tokens are given out; `running` run already. Who was."""
        self.blocked = False
        admitted: list[Job] = []
        if not self._core.statistics_now.waiting:  # what most slices find: spare the order
            return admitted
        order, jobs, tile = self._core.order, self._core.jobs, self._config.tile
        rows: RunningRows | None = None
        misfits: set[int] = set()
        while budget > 0 and self._free_slots:
            number = order.next()
            if number is None or number in misfits:
                break
            job = jobs[number]
            size: int | None = None
            if len(job.sequences) <= len(self._free_slots):
                if rows is None:
                    rows = self.running_rows(running)
                size = self._try_admit(job, rows, steps)
                if size is None and not rows and not self._core.num_in_flight:
                    self._core.outgrown(job)  # since a preemption longer than what was checked
                    continue
                self.blocked = self.blocked or size is None
            if size is None:
                misfits.add(number)
                order.on(Misfit(number))
                continue
            budget -= max(size, tile)
            admitted.append(job)
            self._note_admission(job, now_s)
        return admitted

    def _try_admit(self, job: Job, running: RunningRows, steps: int) -> int | None:
        """Lease and seat a job: prompt tokens left to run, or None when it does not fit."""
        rows, pool = job.sequences, self._pool
        fresh = len(rows) > 1 and not any(row.made for row in rows) and job.request.prompt.size > 1
        leaders = [Sequence(job, -1, 0)] if fresh else rows
        match = self._core.prefixes.match(job)
        lengths = [row.length for row in leaders]
        candidate = Candidate(
            num_tokens=max(lengths),
            cost_pages=pool.cost_of_all(lengths, match),
            max_output=max([row.remaining for row in rows]),
            num_samples=len(rows),
            client=job.request.client,
            made=max([len(row.made) for row in rows]),
            forks=fresh,
        )
        memory = self.memory(pool.num_available, steps)
        if not self._core.admission.admits(candidate, running, memory):
            return None
        left = 0
        for place, row in enumerate(leaders):
            if place:
                match = self._core.prefixes.match(job)  # the lease before may have evicted
            granted = pool.lease(row.length, match)
            if not isinstance(granted, Granted):
                self._unseat(leaders)
                return None
            row.lease = granted.lease
            row.computed = row.lease.num_shared * pool.page_size
            left += row.length - row.computed
        if fresh:
            left += len(rows) - 1  # each sample runs the prompt's last token for itself
        self._seat(job, leaders, fresh, left)
        if job.parent is not None:
            self._add_unforked(running, job)
        else:
            running.extend(map(_as_running, rows), len(rows))
        return left

    def _unseat(self, rows: list[Sequence]) -> None:
        for row in rows:
            if row.lease is not None:
                self._pool.release(row.lease)
                row.lease, row.computed = None, 0

    def _seat(self, job: Job, leaders: list[Sequence], fresh: bool, left: int) -> None:
        statistics = self._core.statistics_now
        for row in job.sequences:
            row.slot = heapq.heappop(self._free_slots)
            row.phase, row.ahead = Phase.PREFILL, 0
        if fresh:
            job.parent = leaders[0]
            job.parent.phase = Phase.PREFILL
        job.running = True
        if not job.announced:
            job.cached_tokens = leaders[0].computed
        else:
            statistics.recomputed_tokens += left
        statistics.waiting -= 1
        statistics.waiting_tokens -= job.request.prompt.size
        self._core.order.on(Admit(job.number, left))

    def _note_admission(self, job: Job, now_s: float) -> None:
        if job.admitted_s is None:  # else it was preempted
            job.admitted_s = now_s
            queue_time_s = now_s - job.arrived_s
            self._core.statistics_now.request_queue_time_seconds.observe(queue_time_s)
        gap = max(now_s - self._last_admission_s, 1e-3)
        self._last_admission_s = now_s
        self._admitted_per_s = 0.9 * self._admitted_per_s + 0.1 / gap


def _as_running(row: Sequence, leased_pages: int | None = None) -> Running:
    """`leased_pages`: where they are not those of its lease."""
    if leased_pages is None:
        assert row.lease is not None
        leased_pages = len(row.lease.pages)
    known, ahead = row.length + row.ahead, row.ahead
    return Running(
        known, leased_pages, row.max_length - known, len(row.made) + ahead, row.job.request.client
    )
