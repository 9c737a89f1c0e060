"""What admission rules and slicings promise, as checks over a toy pool and made-up slices.

A law is a function of a way to make the rule and a seed; it raises AssertionError where the rule
breaks it. Knows no rule: `catalog.py` says who claims what.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from .admission import Admission, Candidate, Memory, Running, RunningRows
from .estimators.serving_time import SliceShape
from .slicing import SliceBounds, SliceLength, Slicing, SlicingView

MakeAdmission = Callable[[], Admission]
MakeSlicing = Callable[[SliceBounds], Slicing]

PAGE: Final = 8
"""Tokens of a page of the toy pool."""
STEPS: Final = 40
LONGEST_PROMPT: Final = 40
MOST_OUTPUT: Final = 30
CLIENTS: Final = ("a", "b")


# ------------------------------------------------------------------------------- admission rules


@dataclass
class _Work:
    """A request of one sample that makes `output` of the `most` tokens it may make."""

    client: str
    prompt: int
    most: int
    output: int
    made: int = 0
    leased: int = 0
    preempted: bool = False

    @property
    def held(self) -> int:
        return self.prompt + self.made

    def candidate(self) -> Candidate:
        cost = -(-self.held // PAGE)
        return Candidate(self.held, cost, self.most - self.made, 1, self.client, self.made)

    def running(self) -> Running:
        return Running(self.held, self.leased, self.most - self.made, self.made, self.client)


@dataclass
class _ToyPool:
    """Lets in, first come first served, whom the rule admits.

    Everybody makes a token a step, or, unless `in_step`, a random part of them. When pages run out
    the newest gives way; who is alone and has no page left ends.
    """

    rule: Admission
    rng: random.Random
    total_pages: int
    in_step: bool
    waiting: deque[_Work] = field(default_factory=deque)
    rows: list[_Work] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    ended: int = 0
    preemptions: int = 0

    def memory(self) -> Memory:
        leased = sum(work.leased for work in self.rows)
        return Memory(PAGE, self.total_pages, self.total_pages - leased, 0, 4)

    def arrive(self) -> bool:
        """A request comes; whether it is accepted: it would be let in if it were alone."""
        rng = self.rng
        most = rng.randint(1, MOST_OUTPUT)
        prompt = rng.randint(1, LONGEST_PROMPT)
        work = _Work(rng.choice(CLIENTS), prompt, most, rng.randint(1, most))
        pool = Memory(PAGE, self.total_pages, self.total_pages, 0, 4)
        accepted = self.rule.admits(work.candidate(), RunningRows(), pool)
        if accepted:
            self.waiting.append(work)
        return accepted

    def admit(self) -> None:
        while self.waiting:
            work, memory = self.waiting[0], self.memory()
            running = RunningRows(row.running() for row in self.rows)
            admitted = self.rule.admits(work.candidate(), running, memory)
            self.answers.append(admitted)
            if not admitted and (self.rows or not work.preempted):
                assert self.rows, "accepted when it came, and turned down with nothing running"
                return
            self.waiting.popleft()
            if not admitted:  # a preemption made it longer than what was accepted
                self.ended += 1
                continue
            self.rows.append(work)
            work.leased = memory.pages(work.held)
            assert sum(row.leased for row in self.rows) <= self.total_pages, "a prompt on no pages"

    def step(self) -> None:
        for work in list(self.rows):
            if self.in_step or self.rng.random() < 0.7:
                self.make_token(work)
        self.rule.ticked(1)

    def make_token(self, work: _Work) -> None:
        while work in self.rows and work.leased * PAGE < work.held + 1:
            if self.memory().available_pages:
                work.leased += 1
            else:
                self.give_way()
        if work not in self.rows:
            return
        work.made += 1
        if work.made == work.output:
            self.end(work)
            self.rule.finished(work.client, work.made)

    def give_way(self) -> None:
        work = self.rows[-1]
        self.preemptions += 1
        if len(self.rows) == 1:
            self.end(work)
            return
        self.rows.remove(work)
        work.leased, work.preempted = 0, True
        self.waiting.appendleft(work)
        self.rule.retracted(RunningRows(row.running() for row in self.rows))

    def end(self, work: _Work) -> None:
        self.rows.remove(work)
        self.ended += 1


def _traffic(make: MakeAdmission, seed: int, *, in_step: bool = False) -> Iterator[_ToyPool]:
    """The pool after each step, then after the queue has drained."""
    rng = random.Random(seed)
    pool = _ToyPool(make(), rng, rng.randint(4, 30), in_step)
    accepted = 0
    for _ in range(STEPS):
        accepted += sum(pool.arrive() for _ in range(rng.randint(0, 2)))
        pool.admit()
        pool.step()
        yield pool
    for _ in range(100 * STEPS):
        if not (pool.waiting or pool.rows):
            break
        pool.admit()
        pool.step()
        yield pool
    assert pool.ended == accepted, f"{accepted} accepted, {pool.ended} ended"


def accepted_is_served(make: MakeAdmission, seed: int) -> None:
    """Whoever is accepted into the queue ends, and is not turned down with nothing running."""
    for _ in _traffic(make, seed):
        pass


def more_memory_never_refuses(make: MakeAdmission, seed: int) -> None:
    """What fits into a pool fits into a larger one."""
    for pool in _traffic(make, seed):
        if not pool.waiting or pool.rng.random() < 0.5:
            continue
        candidate, small = pool.waiting[0].candidate(), pool.memory()
        running = RunningRows(row.running() for row in pool.rows)
        large = Memory(PAGE, small.total_pages + 1, small.available_pages + 1, 0, 4)
        if pool.rule.admits(candidate, running, small):
            assert pool.rule.admits(candidate, running, large)


def same_events_same_answers(make: MakeAdmission, seed: int) -> None:
    """A second rule, asked and told the same, says the same."""
    first, second = (list(_traffic(make, seed))[-1].answers for _ in range(2))
    assert first == second


def never_preempts(make: MakeAdmission, seed: int) -> None:
    """Nobody has to give way, however rows lag behind each other."""
    for pool in _traffic(make, seed):
        assert not pool.preemptions


def never_preempts_in_step(make: MakeAdmission, seed: int) -> None:
    """Nobody has to give way while all rows make a token a step."""
    for pool in _traffic(make, seed, in_step=True):
        assert not pool.preemptions


# ------------------------------------------------------------------------------------- slicings


def _view(rng: random.Random) -> SlicingView:
    rows = rng.randint(1, 20)
    return SlicingView(
        now_s=rng.random(),
        remaining=[rng.randint(1, 200) for _ in range(rows)],
        context_tokens=rng.randint(rows, 4000),
        prefill_tokens=rng.choice((0, 32, 256)),
        backlog=rng.random() < 0.5,
        cut_prompts=rng.random() < 0.2,
    )


def _seconds(shape: SliceShape) -> float:
    steps = shape.steps * (4e-3 + 2e-4 * shape.rows)
    return 1e-3 + steps + 1e-8 * shape.attended_tokens + 1e-4 * shape.prefill_tokens


def _slices(
    make: MakeSlicing, bounds: SliceBounds, seed: int
) -> Iterator[tuple[SlicingView, SliceLength, float]]:
    """Views, what was chosen for them, and the seconds that it took."""
    rng, slicing = random.Random(seed), make(bounds)
    for _ in range(STEPS):
        if rng.random() < 0.3:
            slicing.arrived(rng.random())
        view = _view(rng)
        choice = slicing.choose(view)
        rows, steps = len(view.remaining), choice.steps
        attended = steps * view.context_tokens + rows * steps * (steps + 1) // 2
        shape = SliceShape(steps, rows, attended, view.prefill_tokens)
        yield view, choice, _seconds(shape)
        ended = rng.randint(0, min(rows, 2))
        made = max(1, steps * rows - ended)
        slicing.ran(shape, slice_s=_seconds(shape), host_s=1e-3, made=made, finished=ended)


def _bounds(*, max_gap_s: float = 0.0, overlap: bool = True) -> SliceBounds:
    return SliceBounds(slice_steps=64, max_context=512, max_gap_s=max_gap_s, overlap=overlap)


def within_bounds(make: MakeSlicing, seed: int) -> None:
    """At least a step, at most what the step buffer holds and the longest row may make; a quorum of
    the rows there are; no more in flight than allowed."""
    for overlap in (False, True):
        bounds = _bounds(overlap=overlap)
        most = make(bounds).max_steps
        for view, choice, _ in _slices(make, bounds, seed):
            assert 1 <= choice.steps <= most
            assert 1 <= choice.quorum <= len(view.remaining)
            assert 1 <= choice.depth <= bounds.depth


def same_slices_again(make: MakeSlicing, seed: int) -> None:
    """A second slicing, told the same, chooses the same."""
    first, second = ([choice for _, choice, _ in _slices(make, _bounds(), seed)] for _ in range(2))
    assert first == second


def keeps_the_gap(make: MakeSlicing, seed: int) -> None:
    """Once it knows how long slices take, what is in flight takes no longer than the gap, or is a
    single step."""
    gap_s = 0.03
    for place, (_, choice, seconds) in enumerate(_slices(make, _bounds(max_gap_s=gap_s), seed)):
        one = (choice.steps, choice.depth) == (1, 1)
        assert place < STEPS // 2 or one or choice.depth * seconds <= 1.2 * gap_s


ADMISSION_LAWS: Final[Mapping[str, Callable[[MakeAdmission, int], None]]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            accepted_is_served,
            more_memory_never_refuses,
            same_events_same_answers,
            never_preempts,
            never_preempts_in_step,
        )
    }
)
SLICING_LAWS: Final[Mapping[str, Callable[[MakeSlicing, int], None]]] = MappingProxyType(
    {law.__name__: law for law in (within_bounds, same_slices_again, keeps_the_gap)}
)
OF_EVERY_ADMISSION: Final = tuple(list(ADMISSION_LAWS)[:3])
OF_EVERY_SLICING: Final = tuple(list(SLICING_LAWS)[:2])
"""What every rule of a kind is held to."""
