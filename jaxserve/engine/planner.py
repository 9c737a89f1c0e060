"""Makes one slice plan: who decodes, who prefills, who is let in, with leases that cover it all.

The order of business follows the design: running rows first (their leases grow, their limits are
cut when pages run short, and only then is somebody preempted), then admissions, then prompts under
the token budget, both in the order's sequence.

With hundreds of rows a slice, a microsecond a row is a third of a millisecond in which the device
may idle: loops over rows touch plain attributes, and go into the details for the few rows that
need them.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxserve.engine import admitter
from jaxserve.engine.admitter import Admitter
from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan
from jaxserve.engine.sequence import Job, Phase, Sequence
from jaxserve.schedulers.events import Enact, Ran, Tick
from jaxserve.schedulers.pages import Forked, Granted, OutOfPages
from jaxserve.schedulers.slicing import SliceLength, Slicing, SlicingView
from jaxserve.schedulers.victims import Runner, VictimKey


@dataclass(slots=True)
class Flight:
    """A dispatched slice: the sequences in its rows, and the steps each was given."""

    number: int
    rows: list[Sequence]
    steps: list[int]


Planned = tuple[SlicePlan, Flight, int]


@dataclass(slots=True)
class _Rows:
    """Of those who run: rows that may still add a token, so not those certain to end in a slice in
    flight, with the most that each may add and the tokens they have together; and rows whose prompt
    is not dispatched to its end, where several samples prefill as one."""

    decoding: list[Sequence]
    prefilling: list[Sequence]
    remaining: list[int]
    context_tokens: int


@runtime_checkable
class Core(admitter.Core, Protocol):
    """What the planner sees of the engine core."""

    slicing: Slicing
    victim_key: VictimKey | None

    def preempt(self, job: Job) -> None: ...


class Planner:
    """The planning half of `EngineCore`."""

    def __init__(self, core: Core, admits: Admitter):
        self._core = core
        self._config = core.config
        self._pool = core.pool
        self._admits = admits
        self._rows: list[RowPlan] = []
        self._sequences: list[Sequence] = []
        self._number = 0

    def plan(self, number: int, now_s: float) -> Planned | None:
        """The next slice, what the core keeps of it, and how many slices may be in flight."""
        self._rows, self._sequences, self._number = [], [], number
        self._core.order.on(Tick(now_s, self._pool.num_available / self._pool.num_pages))
        running = self._running()
        copies = self._fork_parents(running)
        rows = self._rows_of(running)
        prefilling = rows.prefilling
        length = self._core.slicing.choose(self._view(now_s, running, rows))
        self._plan_decode(rows.decoding, length.steps)
        if self._core.slicing.admits_while_running or not self._anyone_runs():
            budget = self._config.scheduler.max_prefill_tokens
            if prefilling:
                budget -= sum([row.length - row.computed for row in prefilling if _prefills(row)])
            admitted = self._admits.admit(running, length.steps, budget=budget, now_s=now_s)
            if admitted:
                # The order says who prefills first: mostly there is one, and nothing to ask.
                alone = len(admitted) == 1 and not prefilling
                prefilling = self._rows_of(admitted if alone else self._running()).prefilling
        if prefilling:
            self._plan_prefill(prefilling, length.steps)
        if not self._rows:
            return None
        given = [row.steps for row in self._rows]
        plan = SlicePlan(
            number,
            max(1, max(given)),
            min(length.quorum, len(given)),
            tuple(self._rows),
            tuple(copies),
        )
        return plan, Flight(number, self._sequences, given), self._bounded_depth(length)

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

    # Who runs, and what the slicing is shown of it.

    def _running(self) -> list[Job]:
        jobs = self._core.jobs
        return [jobs[number] for number in self._core.order.running()]

    def _anyone_runs(self) -> bool:
        rows = (row for job in self._running() for row in job.sequences)
        return any(row.phase in (Phase.DECODE, Phase.PREFILL) for row in rows)

    def _rows_of(self, running: list[Job]) -> _Rows:
        decode, prefill = Phase.DECODE, Phase.PREFILL
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        remaining: list[int] = []
        context_tokens = 0
        for job in running:
            parent = job.parent
            for row in job.sequences:
                phase = row.phase
                if phase is decode:
                    known = row.length + row.ahead
                    if known < row.max_length:
                        decoding.append(row)
                        remaining.append(row.max_length - known)
                        context_tokens += known
                elif phase is prefill and parent is None:
                    prefilling.append(row)
            if parent is not None and parent.phase is prefill:
                prefilling.append(parent)
        return _Rows(decoding, prefilling, remaining, context_tokens)

    def _view(self, now_s: float, running: list[Job], rows: _Rows) -> SlicingView:
        remaining = rows.remaining
        if not remaining:
            remaining = [row.remaining for job in running for row in job.sequences]
            remaining = remaining or [self._core.slicing.max_steps]
        waiting, budget = self._core.statistics_now, self._config.scheduler.max_prefill_tokens
        prompts = admissible = 0
        backlog = False
        if rows.prefilling:
            prompts = sum([self._tiled(row.length - row.computed) for row in rows.prefilling])
        if waiting.waiting:
            backlog = waiting.waiting > self._admits.num_free_slots or self._admits.blocked
            admissible = self._admissible_tokens()
        prefill_tokens = min(budget, prompts + waiting.waiting_tokens)
        cut_prompts = prompts + admissible > budget
        return SlicingView(
            now_s, remaining, rows.context_tokens, prefill_tokens, backlog, cut_prompts
        )

    def _tiled(self, num_tokens: int) -> int:
        """What a chunk takes of the token budget: whole tiles."""
        return -(-num_tokens // self._config.tile) * self._config.tile

    def _admissible_tokens(self) -> int:
        """What the prompts that free slots could take need of the token budget, as if all that wait
        (somebody does) were of mean length. To ask the order who they are would cost more than it
        is worth: who is second depends on who goes first."""
        now = self._core.statistics_now
        # Whom memory keeps out a slot does not let in, and a short slice would not either.
        rows = 0 if self._admits.blocked else min(self._admits.num_free_slots, now.waiting)
        return rows * self._tiled(now.waiting_tokens // now.waiting) if rows else 0

    # Rows that decode already.

    def _plan_decode(self, rows: list[Sequence], steps: int) -> None:
        size, decode, number = self._pool.page_size, Phase.DECODE, self._number
        plans, sequences, touch = self._rows, self._sequences, self._pool.touch
        for row in self._victims_last(rows):
            if row.phase is not decode:  # preempted for somebody in front of it
                continue
            known, lease = row.length + row.ahead, row.lease
            assert lease is not None
            allowed = row.max_length - known
            if allowed > steps:
                allowed = steps
            if row.step_limit and allowed > row.step_limit:
                allowed = row.step_limit
            pages = lease.pages
            if known + allowed - 1 > len(pages) * size:
                allowed = self._grow_or_preempt(row, allowed)
            if allowed:  # as `_add`, without its cases
                touch(lease, number)
                row.last_slice = number
                row.ahead += allowed
                plans.append(RowPlan(row.slot, allowed, len(pages) * size, pages))
                sequences.append(row)

    def _grow_or_preempt(self, row: Sequence, steps: int) -> int:
        """Steps the row's lease covers once it has grown as far as pages allow."""
        while True:
            granted = self._grow(row, steps)
            if granted > 0:
                return granted
            if self._pages_will_return():
                return 0
            victim = self._victim()
            if any(other.job is victim for other in self._sequences):
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
        evicting = any(row.phase is Phase.EVICTING for job in self._running() for row in job.rows())
        return evicting or self._pool.statistics().retiring > 0

    def _victim(self) -> Job:
        """Who gives way next, by the victim rule, of those that are not on their way out."""
        staying = [
            job
            for job in self._running()
            if all(row.phase is not Phase.EVICTING for row in job.rows())
        ]
        assert staying, "somebody runs, or nobody would want a page"
        return sorted(staying, key=self._victim_rank)[-1]

    def _victims_last(self, rows: list[Sequence]) -> list[Sequence]:
        """Rows, given in the order, with who gives way first at the end, so that a victim is hardly
        ever in the slice already. (A preemption's refund may change the order; see where victims
        are taken.)"""
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

    def _plan_prefill(self, rows: list[Sequence], steps: int) -> None:
        tile = self._config.tile
        tiles = self._config.scheduler.max_prefill_tokens // tile
        ran: list[Ran] = []
        for row in rows:
            if tiles <= 0:
                break
            if not _prefills(row):  # preempted for somebody who decodes
                continue
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
                self._add(row, 0, chunk)
            else:
                self._start(row, steps, chunk)
        if ran:
            self._core.order.on(Enact(ran))

    def _covers(self, row: Sequence, num_tokens: int) -> bool:
        assert row.lease is not None
        return isinstance(self._pool.extend(row.lease, num_tokens), Granted)

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
        allowed = self._grow(row, min(steps, row.step_limit or steps, row.remaining))
        assert allowed > 0, (row, allowed)
        self._core.prefixes.share_prompt(row)
        self._add(row, allowed, chunk, start)

    def _add(
        self,
        row: Sequence,
        steps: int,
        chunk: Chunk | None = None,
        start: RowStart | None = None,
    ) -> None:
        lease, slot = row.lease, row.slot
        assert lease is not None
        self._pool.touch(lease, self._number)
        row.last_slice = self._number
        row.ahead += steps
        if slot < 0:  # a parent runs in the slot of the first sample
            slot = row.job.sequences[0].slot
        cover = len(lease.pages) * self._pool.page_size
        self._rows.append(RowPlan(slot, steps, cover, lease.pages, chunk, start))
        self._sequences.append(row)

    def _fork_parents(self, running: list[Job]) -> list[tuple[int, int]]:
        """Parents whose prompt is dispatched give their samples a lease each."""
        copies: list[tuple[int, int]] = []
        for job in running:
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


def _prefills(row: Sequence) -> bool:
    return row.phase is Phase.PREFILL
