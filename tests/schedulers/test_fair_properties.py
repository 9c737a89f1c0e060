"""vtc and dlpm under every setting of their switches: bounds at every instant, credit to the last
token, shares, newcomers, and what they turn into at the ends of a dial. papers.md 3.6, 3.7 and 6.

Clients always have requests waiting, in styles that try what a bound has to stand: all cold and
long, all hot and short, whatever the one who was served most does not do. Tokens are told up to two
slices late, as slices in flight are charged when they come back.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.schedulers.jain import jain
from jaxserve.schedulers.laws import LAWS, LONGEST_PROMPT, MOST_OUTPUT, MOST_PAGES
from jaxserve.schedulers.order import Order
from jaxserve.schedulers.order.dlpm import Dlpm, DlpmParameters
from jaxserve.schedulers.order.fcfs import Fcfs
from jaxserve.schedulers.order.lpm import Lpm, LpmParameters
from jaxserve.schedulers.order.vtc import Vtc, VtcParameters
from jaxserve.schedulers.toy_engine import PAGE, ToyEngine, Work

FEW = settings() if settings().max_examples > 100 else settings(max_examples=12)
"""Overloads run long; a full run keeps its many examples."""

PRICES = dict(
    w_in=st.sampled_from([1.0, 2.0]),
    w_out=st.sampled_from([1.0, 2.0, 3.0]),
    price_cached=st.sampled_from([0.0, 0.5, 1.0]),
)
DLPM = st.builds(
    DlpmParameters,
    quantum=st.integers(1, 200).map(float),
    refill_scope=st.sampled_from(["queued", "queued_or_running"]),
    new_client_credit=st.sampled_from(["0", "quantum"]),
    charge_at=st.sampled_from(["admit", "enacted"]),
    client_age_limit_s=st.sampled_from([0.0, 3.0, 20.0]),
    refill_when=st.sampled_from(["end_of_pass", "mid_pass"]),
    misfit=st.sampled_from(["stop", "skip"]),
    max_skips=st.sampled_from([0, 1, 16]),
    recharge_recompute=st.booleans(),
    **PRICES,
)
VTC = st.builds(VtcParameters, lift=st.booleans(), idle_lift=st.booleans(), **PRICES)

STYLES = ("cold", "hot", "mixed", "contrary")


@dataclass(frozen=True)
class Site:
    """An engine and what its clients do."""

    slots: int
    room: int
    lag: int
    styles: tuple[str, str, str]
    seed: int


SITES = st.builds(
    Site,
    slots=st.integers(1, 5),
    room=st.sampled_from([0, 40, 60]),
    lag=st.sampled_from([0, 1, 2, 4]),
    styles=st.tuples(*[st.sampled_from(STYLES)] * 3),
    seed=st.integers(0, 10**6),
)

Settings = DlpmParameters | VtcParameters


def make(known: Settings) -> Order:
    return Dlpm(known) if isinstance(known, DlpmParameters) else Vtc(known)


class Crowd:
    """Clients that try what they can, on a toy engine that charges as their order should."""

    def __init__(self, known: Settings, site: Site, weights: dict[str, float]):
        self.order = make(known)
        self.weights = weights
        self.styles = dict(zip(weights, site.styles, strict=False))
        self.rng = random.Random(site.seed)
        self.last = 0
        self.engine = ToyEngine(
            self.order,
            site.slots,
            room=site.room,
            lag=site.lag,
            w_in=known.w_in,
            w_out=known.w_out,
            price_cached=known.price_cached,
            recharge=isinstance(known, DlpmParameters) and known.recharge_recompute,
        )
        again = MOST_OUTPUT if self.engine.recharge else 0
        priciest = known.w_in * max(1.0, known.price_cached)
        self.overdraft = priciest * (LONGEST_PROMPT + again)
        self.overdraft += known.w_out * site.slots * MOST_OUTPUT
        self.untold = known.w_out * site.slots * site.lag
        """The most that was served and not told."""

    def arrive(self, client: str) -> None:
        self.last += 1
        rng, style = self.rng, self.styles[client]
        if style == "contrary":
            charged = self.engine.charged
            style = "cold" if charged.get(client, 0) == max(charged.values(), default=0) else "hot"
        pages, output = {
            "cold": ((str(self.last),) * MOST_PAGES, MOST_OUTPUT),
            "hot": (("shared",) * MOST_PAGES, 1),
            "mixed": (
                tuple(rng.choice((client, "shared", str(self.last))) for _ in range(MOST_PAGES)),
                rng.randint(1, MOST_OUTPUT),
            ),
        }[style]
        self.engine.arrive(Work(self.last, client, pages, output, self.weights[client]))

    def crowd(self, clients: Iterator[str] | list[str]) -> None:
        """More requests wait of each than one pass can let in."""
        for client in clients:
            waiting = sum(work.client == client for work in self.engine.waiting.values())
            for _ in range(self.engine.slots + 1 - waiting):
                self.arrive(client)

    def disturb(self) -> Iterator[None]:
        """Evictions, preemptions and aborts, now and then."""
        rng, engine = self.rng, self.engine
        if rng.random() < 0.1 and engine.cached:
            engine.evict(rng.choice(sorted(engine.cached)))
        if rng.random() < 0.1 and len(engine.running) > 1:
            engine.preempt()
            yield
        if rng.random() < 0.05 and engine.running:
            engine.abort(rng.choice(sorted(engine.running)))
            yield

    def overload(self, steps: int, clients: list[str] | None = None) -> Iterator[None]:
        """All `clients` always wait; stops after every move."""
        for _ in range(steps):
            self.crowd(clients or list(self.weights))
            self.engine.fill()
            yield
            self.engine.step()
            yield
            yield from self.disturb()

    def idle_traffic(self, steps: int) -> None:
        """Requests now and then: queues are mostly empty."""
        for _ in range(steps):
            for client in self.weights:
                if self.rng.random() < 0.2:
                    self.arrive(client)
            self.engine.fill()
            self.engine.step()

    def served(self) -> dict[str, float]:
        """By weight."""
        return {name: self.engine.charged.get(name, 0.0) / w for name, w in self.weights.items()}

    def told(self, client: str) -> float:
        """What the order knows that a client was served."""
        working = self.engine.running.values()
        untold = sum(work.made - work.told for work in working if work.client == client)
        return self.engine.charged[client] - self.engine.w_out * untold


def gap(served: dict[str, float], before: dict[str, float]) -> float:
    got = [served[name] - before[name] for name in served]
    return max(got) - min(got)


# ----------------------------------------------------------------------------------------- bounds


@FEW
@given(known=DLPM, site=SITES, heavy=st.sampled_from([1.0, 3.0]))
def test_dlpm_keeps_its_bound_at_every_instant(known, site, heavy) -> None:
    """papers.md 6, items 3, 10 and 11: the gap, the range of credits, and every token of them."""
    crowd = Crowd(known, site, {"a": heavy, "b": 1.0, "c": 1.0})
    start = known.quantum if known.new_client_credit == "quantum" else 0.0
    rounds = dict.fromkeys(crowd.weights, 0.0)
    bound = known.quantum + crowd.overdraft + crowd.untold
    for _ in crowd.overload(40):
        served = crowd.served()
        assert max(served.values()) - min(served.values()) <= bound
        credits = crowd.order.credits()
        for name, weight in crowd.weights.items():
            assert -crowd.overdraft <= credits[name] <= weight * known.quantum
            refilled = credits[name] - start * weight + crowd.told(name)
            now = refilled / (weight * known.quantum)
            assert now == int(now) >= rounds[name], "credit = start + rounds * quantum - charges"
            rounds[name] = now
        assert len(set(rounds.values())) == 1, "who waits throughout is refilled as often"


@FEW
@given(known=DLPM, site=SITES)
def test_dlpm_keeps_twice_its_bound_whatever_was_before(known, site) -> None:
    crowd = Crowd(known, site, {"a": 1.0, "b": 1.0, "c": 1.0})
    crowd.idle_traffic(20)
    crowd.crowd(list(crowd.weights))
    before = crowd.served()
    for _ in crowd.overload(25):
        bound = 2 * (known.quantum + crowd.overdraft + crowd.untold)
        assert gap(crowd.served(), before) <= bound


def vtcs_most(crowd: Crowd) -> float:
    """Half its bound. That of papers.md 4.1 needs an output token to cost as much as a prompt's."""
    engine = crowd.engine
    if engine.w_in > engine.w_out:
        return crowd.overdraft
    batch = engine.slots * (LONGEST_PROMPT + MOST_OUTPUT)
    return min(crowd.overdraft, max(engine.w_in * LONGEST_PROMPT, engine.w_out * batch))


@FEW
@given(known=VTC, site=SITES, heavy=st.sampled_from([1.0, 3.0]))
def test_vtc_keeps_its_bound_at_every_instant(known, site, heavy) -> None:
    """papers.md 6, items 11 and 12."""
    crowd = Crowd(known, site, {"a": heavy, "b": 1.0, "c": 1.0})
    for _ in crowd.overload(40):
        served = crowd.served()
        bound = 2 * vtcs_most(crowd) + crowd.untold
        assert max(served.values()) - min(served.values()) <= bound
        for name, counter in crowd.order.counters().items():
            assert counter == pytest.approx(crowd.told(name) / crowd.weights[name])


@FEW
@given(known=VTC, site=SITES)
def test_vtcs_lift_leaves_no_credit_of_an_idle_time(known, site) -> None:
    known = replace(known, lift=True)
    crowd = Crowd(known, site, {"a": 1.0, "b": 1.0, "c": 1.0})
    for _ in crowd.overload(15, ["a", "b"]):  # c is away
        pass
    crowd.crowd(["a", "b"])
    counters = crowd.order.counters()
    crowd.crowd(["c"])
    assert crowd.order.counters()["c"] == min(counters["a"], counters["b"])
    before = crowd.served()
    for _ in crowd.overload(20):
        bound = 2 * (vtcs_most(crowd) + crowd.untold)
        assert gap(crowd.served(), before) <= bound


@FEW
@given(known=DLPM, site=SITES, known_before=st.booleans())
def test_a_newcomer_waits_for_no_more_than_two_rounds_of_the_others(
    known, site, known_before
) -> None:
    """papers.md 6, item 14, with those in front of it told late."""
    crowd = Crowd(known, site, {"a": 1.0, "b": 1.0, "new": 1.0})
    if known_before:
        crowd.idle_traffic(5)
    others = ["a", "b"]
    for _ in crowd.overload(crowd.rng.randint(1, 20), others):
        pass
    while any(work.client == "new" for work in crowd.engine.waiting.values()):
        crowd.crowd(others)
        crowd.engine.fill()
        crowd.engine.step()
    crowd.arrive("new")
    number, before = crowd.last, crowd.served()
    most = 2 * len(others) * (known.quantum + crowd.overdraft) + 2 * crowd.untold
    for _ in range(1000):
        crowd.crowd(others)
        if number in crowd.engine.fill():
            return
        crowd.engine.step()
        charged = sum(crowd.served()[name] - before[name] for name in others)
        assert charged <= most
    raise AssertionError("it was never let in")


@FEW
@given(known=st.one_of(DLPM, VTC), site=SITES, heavy=st.sampled_from([1.0, 3.0]))
def test_long_windows_are_shared_evenly(known, site, heavy) -> None:
    """Jain's index of service by weight, in every window of 20 (Q + U), is 0.95 at least."""
    if isinstance(known, DlpmParameters):
        known = replace(known, quantum=min(known.quantum, 40.0))
        one = known.quantum
    else:
        one = 0.0
    site = replace(site, slots=min(site.slots, 2))
    crowd = Crowd(known, site, {"a": heavy, "b": 1.0})
    least = 20 * (one + crowd.overdraft + crowd.untold)
    history, first = [crowd.served()], 0
    for _ in crowd.overload(10**6):
        history.append(crowd.served())
        while sum(history[-1].values()) - sum(history[first].values()) >= least:
            window = [history[-1][name] - history[first][name] for name in crowd.weights]
            assert jain(window) >= 0.95
            first += 1
        if first > 20:
            return


@FEW
@given(known=DLPM, extend=st.integers(1, 30), ran=st.just(0) | st.integers(1, 30))
def test_an_admission_taken_back_leaves_credit_as_it_was_but_for_what_ran(
    known, extend, ran
) -> None:
    """papers.md 6, item 4."""
    from jaxserve.schedulers.events import Admit, Arrive, Enact, Preempt

    order = Dlpm(known)
    order.on(Arrive(1, "a", 0, 0.0, 30, 10, 1))
    assert order.next() == 1
    before, ran = order.credits()["a"], min(ran, extend)
    order.on(Admit(1, extend))
    if ran:
        order.on(Enact([(1, ran, 0)]))
    order.on(Preempt(1))
    cached = known.price_cached * (30 - extend) if ran else 0.0
    assert order.credits()["a"] == before - known.w_in * (ran + cached)
    assert list(order.waiting()) == [1] and order.running() == []


# --------------------------------------------------------------------------- laws, any settings


@pytest.mark.parametrize(
    "law", ["everybody_is_in_one_place", "same_events_same_plans", "aborts_leave_no_trace"]
)
@FEW
@given(known=st.one_of(DLPM, VTC), seed=st.integers(0, 10**6))
def test_any_settings_keep_the_laws_of_everyone(law, known, seed) -> None:
    LAWS[law](lambda: make(known), seed)


@FEW
@given(known=st.one_of(DLPM, VTC), seed=st.integers(0, 10**6))
def test_any_settings_let_every_client_in(known, seed) -> None:
    if isinstance(known, DlpmParameters):
        known = replace(known, quantum=min(known.quantum, 64.0))
    LAWS["no_client_starves"](lambda: make(known), seed)


@FEW
@given(known=DLPM, seed=st.integers(0, 10**6))
def test_an_age_limit_lets_every_request_in(known, seed) -> None:
    """papers.md 6, item 13."""
    known = replace(known, quantum=min(known.quantum, 64.0), client_age_limit_s=20.0)
    LAWS["no_request_starves"](lambda: make(known), seed)


@FEW
@given(known=DLPM, site=SITES)
def test_work_is_conserved_or_left_for_one_pass(known, site) -> None:
    """papers.md 6, item 15. A refill in mid-pass leaves who was passed over to the next pass; a
    skip may leave a slot to who has no credit, while who has some does not fit."""
    known = replace(known, refill_scope="queued")
    crowd = Crowd(known, site, {"a": 1.0, "b": 1.0, "c": 1.0})
    engine, idle = crowd.engine, 0
    for _ in range(40):
        for client in crowd.weights:
            if crowd.rng.random() < 0.6:
                crowd.arrive(client)
        admitted = engine.fill()
        left = [n for n, work in engine.waiting.items() if engine.fits(work)]
        if known.misfit == "stop" and known.refill_when == "end_of_pass":
            assert not left or engine.misfits
        idle = 0 if admitted or not left or len(left) < len(engine.waiting) else idle + 1
        assert not idle, "somebody fits, nobody stands in the way, and nobody is let in"
        engine.step()
        for _ in crowd.disturb():
            pass


def test_who_only_runs_and_has_credit_keeps_the_engine_idle_on_wish() -> None:
    """papers.md 3.3: one client with 95 credits left keeps slots from another for 94 steps."""
    for scope, wanted in (("queued", 0), ("queued_or_running", 94)):
        order = Dlpm(DlpmParameters(quantum=100.0, w_out=1.0, refill_scope=scope))
        engine = ToyEngine(order, slots=2)
        engine.arrive(Work(1, "a", (), 200))
        engine.fill()
        engine.arrive(Work(2, "b", ("q",), 1))
        steps = 0
        while 2 not in engine.fill():
            engine.step()
            steps += 1
        assert abs(steps - wanted) <= 5


# ----------------------------------------------------------------------- the ends of the dials

WORKS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.lists(st.sampled_from("xyz"), max_size=4),
        st.integers(1, 5),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=30,
)


def run(order: Order, works, *, slots: int = 2, client: str = "", weight: float = 1.0) -> list[int]:
    """Everybody in the sequence of admission; the last number of a work is a pause before it."""
    engine = ToyEngine(order, slots)
    for number, (name, pages, output, pause) in enumerate(works, 1):
        for _ in range(pause):
            engine.fill()
            engine.step()
        engine.arrive(Work(number, client or name, tuple(pages), output, weight))
    while engine.waiting or engine.running:
        engine.fill()
        engine.step()
    return engine.admitted


def plain_lpm() -> Lpm:
    return Lpm(LpmParameters(in_batch_sharing=0), page_size=PAGE)


@FEW
@given(works=WORKS, known=DLPM)
def test_a_huge_quantum_makes_dlpm_lpm(works, known) -> None:
    """papers.md 6, item 17."""
    huge = replace(known, quantum=1e12, new_client_credit="quantum", client_age_limit_s=0.0)
    assert run(Dlpm(huge), works) == run(plain_lpm(), works)


@FEW
@given(works=WORKS, known=DLPM)
def test_one_client_makes_dlpm_lpm_and_vtc_fcfs(works, known) -> None:
    """papers.md 6, item 18."""
    dlpm = Dlpm(replace(known, refill_when="end_of_pass", client_age_limit_s=0.0))
    assert run(dlpm, works, client="a") == run(plain_lpm(), works, client="a")
    assert run(Vtc(), works, client="a") == run(Fcfs(), works, client="a")


@FEW
@given(works=WORKS, known=DLPM, prices=VTC)
def test_equal_weights_are_none(works, known, prices) -> None:
    doubled = replace(known, quantum=2 * known.quantum)
    assert run(Dlpm(known), works, weight=2.0) == run(Dlpm(doubled), works)
    assert run(Vtc(prices), works, weight=2.0) == run(Vtc(prices), works)


@FEW
@given(known=DLPM, site=SITES)
def test_a_quantum_of_one_token_goes_to_a_least_served_client(known, site) -> None:
    """papers.md 3.7: one slot, nothing shared, integer prices."""
    known = replace(known, quantum=1.0, price_cached=0.0, client_age_limit_s=0.0)
    site = replace(site, slots=1, lag=0, styles=("cold",) * 3)
    crowd = Crowd(known, site, {"a": 1.0, "b": 1.0, "c": 1.0})
    for _ in range(60):
        crowd.crowd(list(crowd.weights))
        before = crowd.served()
        for number in crowd.engine.fill():
            client = crowd.engine.running[number].client
            assert before[client] == min(before.values())
        crowd.engine.step()


@FEW
@given(works=WORKS)
def test_lpm_with_nothing_cached_is_fcfs(works) -> None:
    """papers.md 6, item 19: nothing is shared, or what was cached is evicted at once."""
    alone = [(name, [str(n)], output, pause) for n, (name, _, output, pause) in enumerate(works)]
    assert run(plain_lpm(), alone) == run(Fcfs(), alone)


def test_lpm_starves_and_dlpm_does_not() -> None:
    """An endless hot prefix keeps a cold request of another client waiting under lpm alone."""

    def served_at(order: Order) -> float:
        engine = ToyEngine(order, slots=1)
        engine.cached = {b"p"}
        engine.arrive(Work(1, "cold", ("q",), 1))
        for step in range(2, 1000):
            engine.arrive(Work(step, "hot", ("p",), 1))
            engine.fill()
            engine.step()
            if 1 in engine.admitted:
                return step
        return math.inf

    assert served_at(plain_lpm()) == math.inf
    quanta = (50.0, 500.0, 1e9)
    waits = [served_at(Dlpm(DlpmParameters(quantum=quantum))) for quantum in quanta]
    # papers.md 3.7: 25 steps, 250 steps, never.
    assert 15 <= waits[0] <= 25 and 150 <= waits[1] <= 250 and waits[2] == math.inf
