"""What pool planners promise, as checks over a toy fleet on a clock of its own.

A law is a function of a way to make the planner and a seed; it raises AssertionError where the
planner breaks it. Knows no planner: `catalog.py` says who claims what.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from ..estimators.bilinear import Bilinear, BilinearTime
from ..estimators.memory import KvMemory
from .planner import Planner, PoolSetup
from .request import Batch, PoolRequest, Ran

Make = Callable[[PoolSetup], Planner]

TIME: Final = BilinearTime(Bilinear(1e-4, 2e-4, 1e-4, 1e-2), Bilinear(1e-5, 1e-4, 1e-5, 1e-2))
PAGE: Final = 8
ZETA: Final = 0.9
"""Every planner's default share of memory; a batch may not exceed it."""
LONGEST_PROMPT: Final = 60
MOST_OUTPUT: Final = 40
REQUESTS: Final = 25


@dataclass
class ToyFleet:
    """Requests with hidden outputs on instances that run what they are given, one by one.

    Batches take the estimate times a random factor; some requests are aborted at a random moment.
    """

    planner: Planner
    setup: PoolSetup
    rng: random.Random
    now_s: float = 0.0
    outputs: dict[int, int] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)
    plans: list[list[Batch]] = field(default_factory=list)
    queues: list[deque[Batch]] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queues = [deque() for _ in range(self.setup.instances)]
        self.ends_s = [0.0] * self.setup.instances
        self.seconds = [0.0] * self.setup.instances

    def arrive(self, number: int) -> None:
        rng = self.rng
        most = rng.randint(1, MOST_OUTPUT)
        prompt = rng.randint(1, LONGEST_PROMPT)
        request = PoolRequest(number, self.now_s, prompt, most)
        try:
            self.planner.check(request)
        except ValueError:
            return
        self.outputs[number], self.lengths[number] = rng.randint(1, most), prompt
        self.made[number] = 0
        self.planner.arrived(request)

    def abort(self) -> None:
        alive = sorted(set(self.outputs) - set(self.ended) - self.aborted)
        if alive:
            number = self.rng.choice(alive)
            self.aborted.add(number)
            self.planner.left(number)

    def plan(self) -> None:
        batches = self.planner.plan(self.now_s)
        self.plans.append(batches)
        for batch in batches:
            queue = self.queues[batch.instance]
            queue.append(batch)
            if len(queue) == 1:
                self.begin(batch)

    def begin(self, batch: Batch) -> None:
        self.seconds[batch.instance] = batch.estimate_s * self.rng.uniform(0.5, 1.5)
        self.ends_s[batch.instance] = self.now_s + self.seconds[batch.instance]

    def finish(self, instance: int) -> None:
        """The first batch of the instance's queue has run."""
        self.now_s = self.ends_s[instance]
        batch = self.queues[instance].popleft()
        made, ended = {}, set()
        for number in batch.rows:
            tokens = min(batch.steps, self.outputs[number] - self.made[number])
            made[number] = tokens
            self.made[number] += tokens
            self.lengths[number] += tokens
            if self.made[number] == self.outputs[number]:
                ended.add(number)
                self.ended.append(number)
        steps = max(made.values())
        self.planner.ran(batch, Ran(steps, self.seconds[instance], made, frozenset(ended)))
        if self.queues[instance]:
            self.begin(self.queues[instance][0])

    @property
    def busy(self) -> list[int]:
        return [instance for instance, queue in enumerate(self.queues) if queue]


def _traffic(make: Make, seed: int, *, aborts: bool = False) -> Iterator[ToyFleet]:
    """The fleet after each event, until everybody has ended."""
    rng = random.Random(seed)
    longest = LONGEST_PROMPT + MOST_OUTPUT + 64
    setup = PoolSetup(
        instances=rng.randint(1, 4),
        memory=KvMemory(rng.randint(longest // PAGE, 60), PAGE, 1),
        time=TIME,
        slice_len=rng.choice((1, 4, 16, 64)),
        max_rows=rng.choice((2, 32)),
    )
    fleet = ToyFleet(make(setup), setup, rng)
    arrivals = sorted(rng.uniform(0, 20) for _ in range(REQUESTS))
    for _ in range(1000 * REQUESTS):
        due_s = fleet.planner.due_s(fleet.now_s)
        moments = [(fleet.ends_s[instance], 0, instance) for instance in fleet.busy]
        if arrivals:
            moments.append((arrivals[0], 1, REQUESTS - len(arrivals)))
        if due_s is not None:
            moments.append((due_s, 2, 0))
        if not moments:
            return
        at_s, kind, which = min(moments)
        fleet.now_s = max(at_s, fleet.now_s)
        if kind == 0:
            fleet.finish(which)
        elif kind == 1:
            arrivals.pop(0)
            fleet.arrive(which)
        else:
            fleet.plan()
        if aborts and rng.random() < 0.05:
            fleet.abort()
        yield fleet
    raise AssertionError("it does not come to an end")


def everybody_ends_once(make: Make, seed: int) -> None:
    """Whoever passes the check ends once, after all its tokens, and leaves no load and no page."""
    *_, fleet = _traffic(make, seed)
    assert sorted(fleet.ended) == sorted(fleet.outputs)
    assert fleet.made == fleet.outputs
    _nothing_left(fleet)


def aborts_leave_no_trace(make: Make, seed: int) -> None:
    """The same where some hang up: the rest is served, and nothing stays behind."""
    *_, fleet = _traffic(make, seed, aborts=True)
    assert set(fleet.ended) | fleet.aborted == set(fleet.outputs)
    assert len(fleet.ended) == len(set(fleet.ended))
    _nothing_left(fleet)


def _nothing_left(fleet: ToyFleet) -> None:
    statistics = fleet.planner.statistics()
    assert statistics.pooled == statistics.sent == 0, statistics
    assert not any(statistics.loads_s) and not any(statistics.held_pages), statistics


def batches_fit(make: Make, seed: int) -> None:
    """A row is in one place; a batch has at most the most rows, and fits: padded, or, of a planner
    that holds pages between slices, with all that is held on its instance."""
    for fleet in _traffic(make, seed):
        batches = [batch for queue in fleet.queues for batch in queue]
        sent = [number for batch in batches for number in batch.rows]
        assert len(sent) == len(set(sent)), "a row in two batches"
        memory, held = fleet.setup.memory, fleet.planner.statistics().held_pages
        assert max(held) <= ZETA * memory.num_pages, "out of memory"
        for batch in batches:
            rows = len(batch.rows)
            assert batch.length == max(fleet.lengths[number] for number in batch.rows)
            assert rows <= fleet.setup.max_rows
            fits = rows * (batch.length + batch.steps) <= ZETA * memory.num_tokens
            assert fits or held[batch.instance], "out of memory"
        for instance, queue in enumerate(fleet.queues):
            tokens = sum(fleet.lengths[number] for batch in queue for number in batch.rows)
            assert not held[instance] or tokens <= held[instance] * PAGE, "rows without pages"


def same_events_same_plans(make: Make, seed: int) -> None:
    """A second planner, told the same, plans the same."""
    first, second = (
        [fleet.plans[-1] for fleet in _traffic(make, seed) if fleet.plans] for _ in range(2)
    )
    assert first == second


def no_instance_idles(make: Make, seed: int) -> None:
    """Once it has planned what is due, no instance is idle while requests wait in the pool."""
    for fleet in _traffic(make, seed):
        if fleet.planner.due_s(fleet.now_s) == fleet.now_s:
            continue
        if fleet.planner.statistics().pooled:
            assert len(fleet.busy) == fleet.setup.instances, fleet.planner.statistics()


POOL_LAWS: Final[Mapping[str, Callable[[Make, int], None]]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            everybody_ends_once,
            aborts_leave_no_trace,
            batches_fit,
            same_events_same_plans,
            no_instance_idles,
        )
    }
)
OF_EVERY_POOL: Final = tuple(list(POOL_LAWS)[:4])
"""What every planner is held to."""
