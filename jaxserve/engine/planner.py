"""Makes one slice plan: who decodes, who prefills, who is let in, with leases that cover it all.

The order of business follows the design: running rows first (their leases grow, their limits are
cut when pages run short, and only then is somebody preempted), then prompts under the token budget,
then admissions, in the order's sequence and stopping at the first misfit.
"""

import heapq
from typing import Protocol, runtime_checkable

from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan
from jaxserve.engine.sequence import Job, Phase, Sequence
from jaxserve.engine.statistics import EngineStatistics
from jaxserve.schedulers.admission import (
    Admission,
    Candidate,
    Memory,
    Running,
    RunningRows,
)
from jaxserve.schedulers.events import Admit, Enact, Ran, Tick
from jaxserve.schedulers.order import Order
from jaxserve.schedulers.pages import Forked, Granted, OutOfPages, PagePool
from jaxserve.schedulers.prefix_tree import page_keys
from jaxserve.schedulers.slicing import SliceLength, Slicing, SlicingView
from jaxserve.schedulers.victims import Runner, VictimKey

Planned = tuple[SlicePlan, list[tuple[Sequence, int]], int]


@runtime_checkable
class Core(Protocol):
    """What the planner sees of the engine core."""

    config: CoreConfig
    pool: PagePool
    order: Order
    admission: Admission
    slicing: Slicing
    victim_key: VictimKey | None
    jobs: dict[int, Job]
    statistics_now: EngineStatistics

    @property
    def num_in_flight(self) -> int: ...

    def preempt(self, job: Job) -> None: ...

    def outgrown(self, job: Job) -> None: ...


class Planner:
    """The planning half of `EngineCore`; it owns the row slots."""

    def __init__(self, core: Core):
        self._core = core
        self._config = core.config
        self._pool = core.pool
        self._free_slots = list(range(core.config.scheduler.max_rows))
        self._blocked = False  # by memory, when last tried
        self._admitted_per_s = 1.0
        self._last_admission_s = 0.0
        self._rows: list[RowPlan] = []
        self._sequences: list[tuple[Sequence, int]] = []
        self._number = 0

    def plan(self, number: int, now_s: float) -> Planned | None:
        """The next slice, its rows' sequences with their step limits, and the depth."""
        self._rows, self._sequences, self._number = [], [], number
        self._core.order.on(Tick(now_s))
        copies = self._fork_parents()
        length = self._core.slicing.choose(self._view(now_s))
        self._plan_decode(length.steps)
        if self._core.slicing.admits_while_running or not self._anyone_runs():
            self._admit(length.steps, now_s)
        self._plan_prefill(length.steps)
        if not self._rows:
            return None
        steps = max(1, max(row.steps for row in self._rows))
        quorum = min(length.quorum, len(self._rows))
        plan = SlicePlan(number, steps, quorum, tuple(self._rows), tuple(copies))
        return plan, self._sequences, self._bounded_depth(length)

    def break_stall(self) -> bool:
        """Nobody could get a page, and none will come back: the last in the order gives way."""
        running = self._core.order.running()
        if not running or self._core.num_in_flight:
            return False
        if len(running) == 1:
            self._core.outgrown(self._core.jobs[running[0]])
        else:
            self._core.preempt(self._victim())
        return True

    def _bounded_depth(self, length: SliceLength) -> int:
        return length.depth if self._config.scheduler.overlap else 1

    # Rows that run already.

    def _running(self) -> list[Sequence]:
        jobs = self._core.jobs
        return [row for n in self._core.order.running() for row in jobs[n].sequences]

    def _anyone_runs(self) -> bool:
        return any(row.phase in (Phase.DECODE, Phase.PREFILL) for row in self._running())

    def _decoding(self) -> list[Sequence]:
        """Rows that may still add a token: not those certain to end in a slice in flight."""
        return [
            row
            for row in self._running()
            if row.phase is Phase.DECODE and row.remaining > row.ahead
        ]

    def _view(self, now_s: float) -> SlicingView:
        rows = self._decoding()
        waiting, budget = self._core.statistics_now, self._config.scheduler.max_prefill_tokens
        prompts = sum(self._tiled(row.length - row.computed) for row in self._prefilling())
        full = waiting.waiting > len(self._free_slots) or self._blocked
        return SlicingView(
            now_s=now_s,
            remaining=[row.remaining - row.ahead for row in rows]
            or [row.remaining for row in self._running()]
            or [self._core.slicing.max_steps],
            context_tokens=sum(row.length + row.ahead for row in rows),
            prefill_tokens=min(budget, prompts + waiting.waiting_tokens),
            backlog=full and waiting.waiting > 0,
            cut_prompts=prompts + self._admissible_tokens(budget) > budget,
        )

    def _tiled(self, num_tokens: int) -> int:
        """What a chunk takes of the token budget: whole tiles."""
        return -(-num_tokens // self._config.tile) * self._config.tile

    def _admissible_tokens(self, most: int) -> int:
        """What the prompts of the waiting requests that free slots could take need of the token
        budget; stops beyond `most`."""
        tokens, slots = 0, len(self._free_slots)
        for number in self._core.order.waiting():
            job = self._core.jobs[number]
            slots -= len(job.sequences)
            if slots < 0 or tokens > most:
                break
            tokens += self._tiled(max(row.length for row in job.sequences))
        return tokens

    def _plan_decode(self, steps: int) -> None:
        for row in self._victims_last(self._decoding()):
            if row.phase is not Phase.DECODE:  # preempted for somebody in front of it
                continue
            allowed = self._grow_or_preempt(row, self._allowed(row, steps))
            if allowed:
                self._add(row, allowed)

    def _allowed(self, row: Sequence, steps: int) -> int:
        limit = row.step_limit or steps
        return min(steps, limit, row.remaining - row.ahead)

    def _grow_or_preempt(self, row: Sequence, steps: int) -> int:
        """Steps the row's lease covers once it has grown as far as pages allow."""
        while True:
            granted = self._grow(row, steps)
            if granted > 0:
                return granted
            if self._pages_will_return():
                return 0
            victim = self._victim()
            if any(other.job is victim for other, _ in self._sequences):
                return 0  # it runs in this slice, and will make room
            if victim is not row.job:
                self._core.preempt(victim)
                continue
            if len(self._core.order.running()) == 1 and len(victim.sequences) == 1:
                if not row.ahead:  # else what is in flight is still to be delivered
                    self._core.outgrown(victim)
            else:
                self._core.preempt(victim)
            return 0

    def _grow(self, row: Sequence, steps: int) -> int:
        """Extend the lease for `steps` more tokens, or as far as there are pages."""
        assert row.lease is not None
        known = row.length + row.ahead
        match self._pool.extend(row.lease, known + steps - 1):
            case Granted():
                return steps
            case OutOfPages(available=available):
                most = (len(row.lease.pages) + available) * self._pool.page_size
                self._pool.extend(row.lease, most)
                return min(steps, max(0, most - known + 1))

    def _pages_will_return(self) -> bool:
        jobs = self._core.jobs
        evicting = any(
            row.phase is Phase.EVICTING
            for n in self._core.order.running()
            for row in jobs[n].rows()
        )
        return evicting or self._pool.statistics().retiring > 0

    def _victim(self) -> Job:
        """Who gives way next, by the victim rule, of those that are not on their way out."""
        jobs = (self._core.jobs[number] for number in self._core.order.running())
        staying = [
            job for job in jobs if all(row.phase is not Phase.EVICTING for row in job.rows())
        ]
        assert staying, "somebody runs, or nobody would want a page"
        return sorted(staying, key=self._victim_rank)[-1]

    def _victims_last(self, rows: list[Sequence]) -> list[Sequence]:
        """Rows, given in the order, with who gives way first at the end, so that a victim is not in
        the slice already: planning does not change ranks."""
        if self._core.victim_key is None:
            return rows
        return sorted(rows, key=lambda row: self._victim_rank(row.job))

    def _victim_rank(self, job: Job) -> tuple[int, ...]:
        """Largest gives way first, and of equals the last in the order."""
        key = self._core.victim_key
        if key is None:
            return ()
        made = sum(len(row.made) for row in job.sequences)
        return key(Runner(job.number, job.request.prompt.size, made))

    # Prompts.

    def _plan_prefill(self, steps: int) -> None:
        tile = self._config.tile
        tiles = self._config.scheduler.max_prefill_tokens // tile
        ran: list[Ran] = []
        for row in self._prefilling():
            if tiles <= 0:
                break
            tokens = row.tokens()
            target = tokens.size - 1 if row is row.job.parent else tokens.size
            size = min(target - row.computed, tiles * tile)
            # A parent may wait to fork, and a fork's lease may end before its prompt's last token.
            if not size or not self._covers(row, row.computed + size):
                continue
            tiles -= -(-size // tile)
            chunk = Chunk(tokens[row.computed : row.computed + size], row.computed)
            row.computed += size
            ran.append((row.job.number, size, 0))
            if row.computed < target or row is row.job.parent:
                self._add(row, 0, chunk=chunk)
            else:
                self._start(row, steps, chunk)
        if ran:
            self._core.order.on(Enact(ran))

    def _covers(self, row: Sequence, num_tokens: int) -> bool:
        assert row.lease is not None
        return isinstance(self._pool.extend(row.lease, num_tokens), Granted)

    def _prefilling(self) -> list[Sequence]:
        rows: list[Sequence] = []
        for number in self._core.order.running():
            job = self._core.jobs[number]
            if job.parent is not None:
                if job.parent.phase is Phase.PREFILL:
                    rows.append(job.parent)
            else:
                rows += [row for row in job.sequences if row.phase is Phase.PREFILL]
        return rows

    def _start(self, row: Sequence, steps: int, chunk: Chunk) -> None:
        """The chunk ends the row's prompt: it decodes from this very slice on."""
        request = row.job.request
        row.phase = Phase.DECODE
        start = RowStart(
            params=request.params,
            seed=row.seed,
            max_length=row.max_length,
            prompt=request.prompt,
            made=tuple(row.made),
        )
        row.started = True
        allowed = self._grow(row, self._allowed(row, steps))
        assert row.lease is not None and allowed > 0, (row, allowed)
        if self._shares(row.job) and request.page_keys:
            whole = min(len(request.page_keys), request.prompt.size // self._pool.page_size)
            self._pool.insert(row.lease, request.page_keys[:whole])
        self._add(row, allowed, chunk=chunk, start=start)

    def _add(
        self,
        row: Sequence,
        steps: int,
        *,
        chunk: Chunk | None = None,
        start: RowStart | None = None,
    ) -> None:
        assert row.lease is not None
        self._pool.touch(row.lease, self._number)
        row.last_slice = self._number
        row.ahead += steps
        cover = len(row.lease.pages) * self._pool.page_size
        slot = row.slot if row is not row.job.parent else row.job.sequences[0].slot
        self._rows.append(RowPlan(slot, steps, cover, row.lease.pages, chunk, start))
        self._sequences.append((row, steps))

    def _fork_parents(self) -> list[tuple[int, int]]:
        """Parents whose prompt is dispatched give their samples a lease each."""
        copies: list[tuple[int, int]] = []
        for number in self._core.order.running():
            job = self._core.jobs[number]
            parent = job.parent
            if parent is None or parent.phase is not Phase.PREFILL or parent.lease is None:
                continue
            shared = job.request.prompt.size - 1
            if parent.computed < shared:
                continue
            forked = self._pool.fork(
                parent.lease, len(job.sequences), num_tokens=shared, dispatch=self._number
            )
            if not isinstance(forked, Forked):
                continue  # admission set pages aside for it, but rows in front grew: next slice
            copies += forked.copies
            for row, lease in zip(job.sequences, forked.leases, strict=True):
                row.lease, row.computed = lease, shared
            parent.lease, parent.phase, job.parent = None, Phase.DONE, None
        return copies

    # Admission.

    def memory(self, available_pages: int, slice_steps: int) -> Memory:
        return Memory(
            page_size=self._pool.page_size,
            total_pages=self._pool.num_pages,
            available_pages=available_pages,
            watermark_pages=self._config.scheduler.watermark_pages,
            slice_steps=slice_steps,
        )

    def _admit(self, steps: int, now_s: float) -> None:
        running = self.running_rows()
        self._blocked = False
        budget = self._config.scheduler.max_prefill_tokens - self._queued_prefill()
        while budget > 0:
            if not self._free_slots:
                return
            number = self._core.order.next()
            if number is None:
                return
            job = self._core.jobs[number]
            if len(job.sequences) > len(self._free_slots):
                return
            size = self._try_admit(job, running, steps)
            if size is None and not running and not self._core.num_in_flight:
                self._core.outgrown(job)  # after a preemption it is longer than what was checked
                continue
            if size is None:
                self._blocked = True
                return
            budget -= max(size, self._config.tile)
            self._note_admission(job, now_s)

    def running_rows(self) -> RunningRows:
        """Every row that holds a lease, or will share its parent's, as admission rules see it."""
        jobs = self._core.jobs
        return RunningRows(
            row for number in self._core.order.running() for row in self._as_running(jobs[number])
        )

    def _as_running(self, job: Job) -> list[Running]:
        """Samples that have not forked yet hold their prompt: the first all of the parent's lease,
        the others its whole pages."""
        client, rows = job.request.client, []
        whole = (job.request.prompt.size - 1) // self._pool.page_size  # its last token runs by row
        for place, row in enumerate(job.sequences):
            lease, ahead = row.lease, row.ahead
            if lease is None and job.parent is not None:
                lease = job.parent.lease
            if lease is not None:
                shared = place and row.lease is None
                leased = min(whole, len(lease.pages)) if shared else len(lease.pages)
                made = len(row.made) + ahead
                rows.append(
                    Running(row.length + ahead, leased, row.remaining - ahead, made, client)
                )
        return rows

    def _queued_prefill(self) -> int:
        return sum(row.length - row.computed for row in self._prefilling())

    def _try_admit(self, job: Job, running: RunningRows, steps: int) -> int | None:
        """Lease and seat a job: prompt tokens left to run, or None when it does not fit."""
        rows = job.sequences
        fresh = len(rows) > 1 and not any(row.made for row in rows) and job.request.prompt.size > 1
        leaders = [Sequence(job, -1, 0)] if fresh else rows
        sizes = [row.length for row in leaders]
        keys, tree, size = self.lookup_keys(job), self._pool.tree, self._pool.page_size
        match = tree.match(keys) if keys else None
        candidate = Candidate(
            num_tokens=max(sizes),
            cost_pages=sum(self._pool.cost(each, match) for each in sizes),
            max_output=max(row.remaining for row in rows),
            num_samples=len(rows),
            client=job.request.client,
            made=max(len(row.made) for row in rows),
            forks=fresh,
        )
        memory = self.memory(self._pool.num_available, steps)
        if not self._core.admission.admits(candidate, running, memory):
            return None
        left = 0
        for row in leaders:
            match = tree.match(keys) if keys else None
            granted = self._pool.lease(row.length, match)
            if not isinstance(granted, Granted):
                self._unseat(leaders)
                return None
            row.lease = granted.lease
            row.computed = granted.lease.num_shared * size
            left += row.length - row.computed
        self._seat(job, leaders, fresh, left)
        for row in self._as_running(job):
            running.append(row)
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

    def give_slot(self, row: Sequence) -> None:
        """The row's slot is free for a later slice."""
        if row.slot >= 0:
            heapq.heappush(self._free_slots, row.slot)
        row.slot = -1

    # Prefix cache and rates.

    def lookup_keys(self, job: Job) -> tuple[bytes, ...]:
        """Keys of the pages that the job's prompt could find cached; its last token runs anyway."""
        if not self._shares(job):
            return ()
        return job.request.page_keys[: (job.request.prompt.size - 1) // self._pool.page_size]

    def num_cached(self, job: Job) -> int:
        """How many of those are."""
        return self._pool.tree.num_matched(self.lookup_keys(job))

    def _shares(self, job: Job) -> bool:
        return self._config.prefix_cache and job.request.scope is not None

    def remember(self, row: Sequence) -> None:
        """Put the full pages of what the row has computed, and the host accepted, into the tree."""
        request, size = row.job.request, self._pool.page_size
        if not self._shares(row.job) or row.lease is None or row.sample < 0:
            return
        assert request.scope is not None
        # A decoding row's newest token has no key and value yet; a prefill has up to `computed`.
        whole = (row.length - 1 if row.started else row.computed) // size
        if whole <= row.lease.num_shared:
            return
        keys = list(request.page_keys[: min(whole, len(request.page_keys))])
        if whole > len(keys):
            tokens = row.tokens()[len(keys) * size : whole * size]
            parent = {"parent": keys[-1]} if keys else {}
            keys += page_keys(
                tokens,
                page_size=size,
                scope=request.scope,
                model=self._config.model_key,
                **parent,
            )
        self._pool.insert(row.lease, keys)

    def _note_admission(self, job: Job, now_s: float) -> None:
        if job.admitted_s is None:  # else it was preempted
            job.admitted_s = now_s
            queue_time_s = now_s - job.arrived_s
            self._core.statistics_now.request_queue_time_seconds.observe(queue_time_s)
        gap = max(now_s - self._last_admission_s, 1e-3)
        self._last_admission_s = now_s
        self._admitted_per_s = 0.9 * self._admitted_per_s + 0.1 / gap

    def drain_time_s(self, now_s: float) -> float:
        """When a full queue may have a place: one admission, or the silence since the last."""
        silence = now_s - self._last_admission_s
        return min(60.0, max(1.0, 1 / self._admitted_per_s, silence))
