"""What routing policies promise, as checks over a toy fleet. One suite runs over the catalogue.

A law is a function of a way to make the policy and a seed; it raises AssertionError where the
policy breaks it. Knows no policy: `catalog.py` says who claims what.
"""

import copy
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

import numpy as np

from ..events import CacheChange
from ..prefix_tree import NO_PARENT, Cleared, Removed, Stored
from .base import Choice, Dispatch, Routable, Routing
from .views import LoadReport, Views

Make = Callable[[int, int], Routing]
"""make(number of replicas, page size)"""
Law = Callable[[Make, int], None]
"""law(make, seed of the requests); raises AssertionError."""

PAGE: Final = 4
REPLICAS: Final = 4
STEPS: Final = 60
MOST_PAGES: Final = 4
LONGEST_PROMPT: Final = MOST_PAGES * PAGE + 1
MOST_OUTPUT: Final = 6
CLIENTS: Final = ("a", "b", "c")
KV_TOKENS: Final = 200
MOST_QUANTUM: Final = 64.0
"""Policies with a quantum are held to what one of this size allows."""
W_OUT: Final = 2.0
"""Price of an output token; a prompt token's is 1."""


@runtime_checkable
class GivesCredit(Protocol):
    """A policy that gives clients credit on each replica, in priced tokens."""

    def credits(self, client: str) -> np.ndarray:
        """By replica, [R] float."""
        ...


def make_request(rng: random.Random, number: int) -> Routable:
    """A prompt of random pages; few have many different ones."""
    client = rng.choice(CLIENTS)
    pages = [rng.choice((client, "shared", str(number))) for _ in range(rng.randint(0, MOST_PAGES))]
    keys = tuple("/".join(pages[: place + 1]).encode() for place in range(len(pages)))
    num_tokens = len(pages) * PAGE + 1
    session = f"{client}{rng.randint(0, 3)}"
    return Routable(
        number=number,
        client=client,
        num_prompt_tokens=num_tokens,
        page_keys=keys,
        session=session,
        weight=1.0,
    )


class ToyFleet:
    """Replicas that receive late, report late or never, and tell of their caches late.

    Reports are lost and overtake each other; cache events of a replica keep their order.
    """

    def __init__(self, routing: Routing, rng: random.Random, num_replicas: int = REPLICAS):
        self.routing, self.rng = routing, rng
        self.views = Views(num_replicas)
        self.choices: list[Choice] = []
        self.live: dict[int, Dispatch] = {}
        self.charged: defaultdict[tuple[str, int], float] = defaultdict(float)
        self.most_live: Counter[tuple[str, int]] = Counter()
        self._num_made = self._num_reports = 0
        self._way: list[deque[Dispatch]] = [deque() for _ in range(num_replicas)]
        self._there: list[dict[int, Dispatch]] = [{} for _ in range(num_replicas)]
        self._received = [0] * num_replicas
        self._reports: list[tuple[int, LoadReport]] = []
        self._cached: list[list[bytes]] = [[] for _ in range(num_replicas)]
        self._events: list[deque[tuple[CacheChange, int]]] = [deque() for _ in range(num_replicas)]

    def send(self) -> None:
        """A request is routed and sent."""
        self._num_made += 1
        self.views.now_s = float(self._num_made)
        request = make_request(self.rng, self._num_made)
        choice = self.routing.choose(request, self.views)
        replica, num_cached = choice
        self.choices.append(choice)
        assert replica in self.views.candidates, f"{replica} is not healthy"
        assert 0 <= num_cached < request.num_prompt_tokens
        number = self.views.sent(
            replica,
            num_extend_tokens=request.num_prompt_tokens - num_cached,
            num_prompt_tokens=request.num_prompt_tokens,
        )
        dispatch = Dispatch(request, replica, number, num_cached)
        self.routing.sent(dispatch)
        self.live[request.number] = dispatch
        self._way[replica].append(dispatch)
        place = request.client, replica
        self.charged[place] += request.num_prompt_tokens
        now = sum((it.request.client, it.replica) == place for it in self.live.values())
        self.most_live[place] = max(self.most_live[place], now)

    def receive(self, replica: int) -> None:
        """The next request on its way arrives."""
        if self._way[replica]:
            dispatch = self._way[replica].popleft()
            self._received[replica] += 1
            self._there[replica][dispatch.request.number] = dispatch

    def end(self, replica: int) -> None:
        """A request that arrived is over; its pages are cached."""
        if not self._there[replica]:
            return
        number = self.rng.choice(sorted(self._there[replica]))
        dispatch = self._there[replica].pop(number)
        del self.live[number]
        num_made = self.rng.randint(0, MOST_OUTPUT)
        self.charged[dispatch.request.client, replica] += W_OUT * num_made
        self.views.ended(replica)
        self.routing.ended(dispatch, num_made)
        keys = dispatch.request.page_keys
        known = sum(key in self._cached[replica] for key in keys)
        if known < len(keys):
            self._cached[replica] += keys[known:]
            parent = keys[known - 1] if known else NO_PARENT
            self._tell(replica, Stored(0, parent, keys[known:]))

    def evict(self, replica: int) -> None:
        """A page that nothing continues is evicted, or, rarely, all are."""
        cached = self._cached[replica]
        if not cached:
            return
        if self.rng.random() < 0.1:
            cached.clear()
            self._tell(replica, Cleared(0))
            return
        leaves = [key for key in cached if not any(it.startswith(key + b"/") for it in cached)]
        key = self.rng.choice(leaves)
        cached.remove(key)
        self._tell(replica, Removed(0, (key,)))

    def _tell(self, replica: int, event: CacheChange) -> None:
        self._events[replica].append((event, self._received[replica]))

    def hear(self, replica: int) -> None:
        """The replica's next cache event comes through."""
        if self._events[replica]:
            self.routing.cache_changed(replica, *self._events[replica].popleft())

    def write_report(self, replica: int) -> None:
        """The replica reports; the report is on its way."""
        self._num_reports += 1
        there = self._there[replica].values()
        prompts = sum(it.request.num_prompt_tokens for it in there)
        report = LoadReport(
            at_s=float(self._num_reports),
            num_received=self._received[replica],
            num_waiting=len(there),
            num_running=0,
            waiting_tokens=sum(it.num_extend_tokens for it in there),
            waiting_prompt_tokens=prompts,
            kv_free_tokens=max(0, KV_TOKENS - prompts),
            kv_total_tokens=KV_TOKENS,
            prefill_rate=100.0 * (replica + 1),
            release_rate=50.0,
        )
        self._reports.append((replica, report))

    def report_now(self, replica: int) -> None:
        """The replica reports, and the report comes through."""
        self.write_report(replica)
        self.views.report(*self._reports.pop())

    def read_report(self) -> None:
        """One of the reports on their way comes through, or is lost."""
        if self._reports:
            replica, report = self._reports.pop(self.rng.randrange(len(self._reports)))
            if self.rng.random() < 0.8:
                self.views.report(replica, report)

    def flip_health(self) -> None:
        """A replica stops or starts to be a candidate; one always is."""
        replica = self.rng.randrange(len(self.views))
        if not self.views.healthy[replica]:
            self.views.set_healthy(replica, True)
            self.routing.returned(replica)
        elif len(self.views.candidates) > 1:
            self.views.set_healthy(replica, False)

    def replace(self) -> None:
        """A replica is lost with all it had, and a fresh one takes its place."""
        replica = self.rng.randrange(len(self.views))
        gone = [it for it in self.live.values() if it.replica == replica]
        self.views.lost(replica)
        self.routing.lost(replica, gone)
        for dispatch in gone:
            del self.live[dispatch.request.number]
        self._way[replica].clear()
        self._there[replica].clear()
        self._cached[replica].clear()
        self._events[replica].clear()
        self._received[replica] = 0
        self._reports = [(it, report) for it, report in self._reports if it != replica]
        self.views.joined(replica)
        self.routing.joined(replica)

    def settle(self) -> None:
        """All arrives and ends, all events are heard, and each replica reports."""
        for replica in range(len(self.views)):
            while self._way[replica]:
                self.receive(replica)
            while self._there[replica]:
                self.end(replica)
            while self._events[replica]:
                self.hear(replica)
            self.report_now(replica)

    def cached(self, replica: int) -> set[bytes]:
        """What the replica's cache really holds."""
        return set(self._cached[replica])


def traffic(fleet: ToyFleet, *, changes: bool) -> Iterator[ToyFleet]:
    """The fleet after each step; with `changes` replicas come and go."""
    rng = fleet.rng
    for _ in range(STEPS):
        if rng.random() < 0.8:
            fleet.send()
        for replica in range(len(fleet.views)):
            moves = (fleet.receive, fleet.end, fleet.evict, fleet.hear, fleet.write_report)
            for move, share in zip(moves, (0.5, 0.3, 0.2, 0.5, 0.3), strict=True):
                if rng.random() < share:
                    move(replica)
        if rng.random() < 0.7:
            fleet.read_report()
        if changes and rng.random() < 0.2:
            fleet.flip_health()
        if changes and rng.random() < 0.05:
            fleet.replace()
        yield fleet


def _run(make: Make, seed: int, *, changes: bool = True, num_replicas: int = REPLICAS) -> ToyFleet:
    fleet = ToyFleet(make(num_replicas, PAGE), random.Random(seed), num_replicas)
    for _ in traffic(fleet, changes=changes):
        pass
    return fleet


def only_the_healthy_are_named(make: Make, seed: int) -> None:
    """Whatever comes and goes, a request goes to a replica that is a candidate then."""
    _run(make, seed)


def same_events_same_choices(make: Make, seed: int) -> None:
    """A second object, told the same, chooses the same: no clock, no luck but from its seed."""
    assert _run(make, seed).choices == _run(make, seed).choices


def nothing_stays_in_flight(make: Make, seed: int) -> None:
    """When all has ended and reports have caught up, nothing is in flight or outstanding."""
    fleet = _run(make, seed)
    fleet.settle()
    views = fleet.views
    for name in ("outstanding", "in_flight", "in_flight_tokens", "in_flight_prompt_tokens"):
        assert not getattr(views, name).any(), name


def alone_takes_all(make: Make, seed: int) -> None:
    """The only replica gets everything."""
    fleet = _run(make, seed, changes=False, num_replicas=1)
    assert {choice.replica for choice in fleet.choices} == {0}


def longer_queues_attract_nobody(make: Make, seed: int) -> None:
    """Who was not chosen is not chosen when it has more to do, or less memory."""
    fleet = ToyFleet(make(REPLICAS, PAGE), random.Random(seed))
    for _ in traffic(fleet, changes=True):
        request = make_request(random.Random(seed), 10**6)
        chosen = fleet.routing.choose(request, fleet.views).replica
        for other in range(REPLICAS):
            if other == chosen:
                continue
            for column, change in (
                ("outstanding", 1),
                ("waiting_tokens", 1),
                ("waiting_prompt_tokens", PAGE),
                ("in_flight_tokens", PAGE),
                ("kv_free_tokens", -PAGE),
            ):
                views = copy.copy(fleet.views)
                setattr(views, column, getattr(views, column).copy())
                getattr(views, column)[other] += change
                assert fleet.routing.choose(request, views).replica != other, column


def _credit(fleet: ToyFleet, client: str) -> np.ndarray:
    assert isinstance(fleet.routing, GivesCredit)
    return fleet.routing.credits(client)


def _overdraft(fleet: ToyFleet) -> float:
    """U: the most that one dispatch and the outputs of all in flight there can cost."""
    return LONGEST_PROMPT + W_OUT * MOST_OUTPUT * max(fleet.most_live.values(), default=0)


def credit_stays_in_range(make: Make, seed: int) -> None:
    """A client's credit on a replica is a quantum at most, and overdrawn by U at most, U being the
    longest prompt and the outputs of all its requests in flight there."""
    fleet = ToyFleet(make(REPLICAS, PAGE), random.Random(seed))
    for _ in traffic(fleet, changes=False):
        for client in CLIENTS:
            credit = _credit(fleet, client)
            assert credit.max() <= MOST_QUANTUM, credit
            assert credit.min() >= -_overdraft(fleet), credit


def replicas_share_each_client(make: Make, seed: int) -> None:
    """What a client is charged on two replicas differs by a quantum and U at most."""
    fleet = ToyFleet(make(REPLICAS, PAGE), random.Random(seed))
    for _ in traffic(fleet, changes=False):
        for client in CLIENTS:
            charged = [fleet.charged[client, replica] for replica in range(REPLICAS)]
            gap = max(charged) - min(charged)
            assert gap <= MOST_QUANTUM + _overdraft(fleet), (client, charged)


LAWS: Final[Mapping[str, Law]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            only_the_healthy_are_named,
            same_events_same_choices,
            nothing_stays_in_flight,
            alone_takes_all,
            longer_queues_attract_nobody,
            credit_stays_in_range,
            replicas_share_each_client,
        )
    }
)
OF_EVERYONE: Final = tuple(list(LAWS)[:4])
"""What every routing policy is held to."""
