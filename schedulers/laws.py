"""What orders promise, as checks over a toy engine. One suite runs them over the whole catalogue.

A law is a function of a way to make the order; it raises AssertionError where the order breaks it.
Knows no policy: `catalog.py` says who claims what.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Final

from .events import Event
from .jain import jain
from .order import Order
from .toy_engine import PAGE, ToyEngine, Work

Make = Callable[[], Order]
Law = Callable[[Make, int], None]
"""law(make, seed of the requests); raises AssertionError."""

CLIENTS: Final = ("a", "b", "c")
STEPS: Final = 40
MOST_PAGES: Final = 3
MOST_OUTPUT: Final = 6
LONGEST_PROMPT: Final = MOST_PAGES * PAGE + 1
MOST_QUANTUM: Final = 64.0
"""Orders with a quantum are held to the gap that one of this size allows."""


class _Recorder:
    """An order that remembers what it was told and what it said."""

    def __init__(self, order: Order):
        self.order = order
        self.events: list[Event] = []
        self.said: list[object] = []

    def on(self, event: Event) -> None:
        self.events.append(event)
        self.order.on(event)

    def next(self) -> int | None:
        number = self.order.next()
        self.said.append(number)
        return number

    def waiting(self) -> Iterator[int]:
        return self.order.waiting()

    def running(self) -> list[int]:
        running = self.order.running()
        self.said.append(tuple(running))
        return running


def _work(rng: random.Random, number: int, client: str) -> Work:
    pages = tuple(rng.choice((client, "shared", str(number))) for _ in range(MOST_PAGES))
    return Work(number, client, pages[: rng.randint(0, MOST_PAGES)], rng.randint(1, MOST_OUTPUT))


def _traffic(order: Order, rng: random.Random, *, slots: int = 3) -> Iterator[ToyEngine]:
    """Random arrivals, ends, preemptions, aborts and evictions; the engine after each move."""
    engine, number = ToyEngine(order, slots), 0
    for _ in range(STEPS):
        for client in CLIENTS:
            if rng.random() < 0.4:
                number += 1
                engine.arrive(_work(rng, number, client))
        engine.fill()
        yield engine
        engine.step()
        if rng.random() < 0.15 and len(engine.running) > 1:
            engine.preempt()
        if rng.random() < 0.15 and engine.waiting:
            engine.abort(rng.choice(sorted(engine.waiting)))
        if rng.random() < 0.1 and engine.running:
            engine.abort(rng.choice(sorted(engine.running)))
        if rng.random() < 0.15 and engine.cached:
            engine.evict(rng.choice(sorted(engine.cached)))
        yield engine


def everybody_is_in_one_place(make: Make, seed: int) -> None:
    """Waiting and running are who they should be, each once; who is named next is waiting."""
    order = make()
    for engine in _traffic(order, random.Random(seed)):
        waiting, running = list(order.waiting()), order.running()
        assert sorted(waiting) == sorted(engine.waiting), "waiting"
        assert sorted(running) == sorted(engine.running), "running"
        number = order.next()
        assert number is None or number in engine.waiting, "next"


def same_events_same_plans(make: Make, seed: int) -> None:
    """A second object, told the same, says the same: no clock, no luck, no memory beside events."""
    first = _Recorder(make())
    for _ in _traffic(first, random.Random(seed)):
        pass
    second = _Recorder(make())
    for _ in _traffic(second, random.Random(seed)):
        pass
    assert first.events == second.events and first.said == second.said


def aborts_leave_no_trace(make: Make, seed: int) -> None:
    """When all are gone nobody is left, and a newcomer is let in at once."""
    order = make()
    *_, engine = _traffic(order, random.Random(seed))
    for number in [*engine.waiting, *engine.running]:
        engine.abort(number)
    assert list(order.waiting()) == [] and order.running() == [] and order.next() is None
    engine.arrive(Work(10**6, "newcomer", (), 1))
    assert engine.fill() == [10**6]


def work_conserving(make: Make, seed: int) -> None:
    """No slot stays free while somebody waits."""
    order = make()
    for place, engine in enumerate(_traffic(order, random.Random(seed))):
        if place % 2 == 0:  # right after admission
            assert not engine.waiting or len(engine.running) == engine.slots


def no_client_starves(make: Make, seed: int) -> None:
    """One request of a quiet client gets in, however much the others bring."""
    _expect_served(make, seed, quiet="quiet")


def no_request_starves(make: Make, seed: int) -> None:
    """A cold request gets in, however many hot ones its own client brings."""
    _expect_served(make, seed, quiet="loud")


def _expect_served(make: Make, seed: int, *, quiet: str) -> None:
    rng = random.Random(seed)
    engine = ToyEngine(make(), 1)
    engine.cached = {b"hot", b"hot/hot"}
    engine.arrive(Work(0, quiet, ("cold",) * MOST_PAGES, MOST_OUTPUT))
    for number in range(1, 10 * STEPS):
        pages = ("hot", "hot")[: rng.randint(1, 2)]
        engine.arrive(Work(number, "loud", pages, rng.randint(1, MOST_OUTPUT), priority=-1))
        if 0 in engine.fill():
            return
        engine.step()
    raise AssertionError(f"a request of {quiet!r} waited for {10 * STEPS} others")


SLOTS: Final = 3
MOST_WINDOWS: Final = 10
OVERDRAFT: Final = LONGEST_PROMPT + MOST_OUTPUT + 2.0 * SLOTS * MOST_OUTPUT
"""The most that one admission and the outputs of all slots can be charged."""


def _overload(make: Make, seed: int) -> Iterator[ToyEngine]:
    """Clients that always wait, the first of them greedy; the engine after each pass."""
    rng = random.Random(seed)
    engine, number = ToyEngine(make(), SLOTS), 0
    while True:
        for client, most in zip(CLIENTS, (3 * SLOTS, SLOTS + 1, SLOTS + 1), strict=True):
            while sum(work.client == client for work in engine.waiting.values()) < most:
                number += 1
                engine.arrive(_work(rng, number, client))
        engine.fill()
        yield engine
        engine.step()


def bounded_service_gap(make: Make, seed: int) -> None:
    """Clients that always wait are served within Q + 2 U of each other, at every instant.

    U is the overdraft. That covers what dlpm (Q + U, papers.md 3.6) and vtc (2 U, 4.1) claim; their
    own tests hold them to it exactly.
    """
    for engine in islice(_overload(make, seed), 5 * STEPS):
        gap = max(engine.charged.values()) - min(engine.charged.values())
        assert gap <= MOST_QUANTUM + 2 * OVERDRAFT, gap


def shares_evenly(make: Make, seed: int) -> None:
    """Of windows in which clients that always wait are served 20 (Q + U) together, Jain's index is
    0.95 at least."""
    history: list[list[float]] = []
    first = 0
    for engine in _overload(make, seed):
        history.append(list(engine.charged.values()))
        while sum(history[-1]) - sum(history[first]) >= 20 * (MOST_QUANTUM + OVERDRAFT):
            window = [b - a for a, b in zip(history[first], history[-1], strict=True)]
            index = jain(window)
            assert index is not None and index >= 0.95, window
            first += 1
        if first > MOST_WINDOWS:
            return


LAWS: Final[Mapping[str, Law]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            everybody_is_in_one_place,
            same_events_same_plans,
            aborts_leave_no_trace,
            work_conserving,
            no_client_starves,
            no_request_starves,
            bounded_service_gap,
            shares_evenly,
        )
    }
)
OF_EVERYONE: Final = tuple(list(LAWS)[:3])
"""What every order is held to."""
