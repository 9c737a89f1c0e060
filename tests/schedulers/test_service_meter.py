"""The service meter: what counts, what a window is, and that orders keep to their bounds in it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.events import Abort, Admit, Arrive, Enact, Event, Finish, Preempt, Tick
from jaxserve.schedulers.order import Order
from jaxserve.schedulers.order.charges import KNOWN_CLIENT_S
from jaxserve.schedulers.order.dlpm import Dlpm, DlpmParameters
from jaxserve.schedulers.order.fcfs import Fcfs
from jaxserve.schedulers.order.vtc import Vtc, VtcParameters
from jaxserve.schedulers.service_meter import MOST_COMPARED, MOST_IDLE, ServiceMeter
from jaxserve.schedulers.toy_engine import ToyEngine, Work


def arrive(number: int, client: str, tokens: int = 10, *, at_s: float = 0.0, weight=1.0) -> Arrive:
    return Arrive(number, client, 0, at_s, tokens, 10, 1, weight=weight)


def tell(order: Order, *events: Event) -> None:
    for event in events:
        order.on(event)


def counts(meter: ServiceMeter, name: str) -> tuple[int, int, int]:
    (client,) = meter.clients(name=name)
    return client.computed, client.cached, client.output


# ------------------------------------------------------------------------------------ what counts


def test_cached_tokens_count_in_one_service_alone() -> None:
    for order, service, uncached in (
        (Fcfs(), 10 + 2 * 3, 4 + 2 * 3),
        (Dlpm(DlpmParameters(w_in=2.0, w_out=5.0)), 20 + 15, 8 + 15),
        (Vtc(VtcParameters(w_in=3.0)), 30 + 6, 12 + 6),
    ):
        meter = ServiceMeter(order)
        tell(meter, arrive(1, "a"), Tick(0.0))
        assert meter.next() == 1
        tell(meter, Admit(1, 4), Enact([(1, 4, 0)]), Enact([(1, 0, 2)]), Enact([(1, 0, 1)]))
        assert counts(meter, "a") == (4, 6, 3)
        (client,) = meter.clients()
        assert (client.service, client.service_uncached) == (service, uncached)


def test_what_is_computed_again_is_not_counted_again() -> None:
    meter = ServiceMeter(Fcfs())
    tell(meter, arrive(1, "a"), Admit(1, 8), Enact([(1, 5, 0)]), Preempt(1))
    assert counts(meter, "a") == (5, 2, 0)
    tell(meter, Admit(1, 10), Enact([(1, 10, 3)]), Preempt(1))
    assert counts(meter, "a") == (10, 2, 3)
    tell(meter, Admit(1, 13), Enact([(1, 13, 1)]), Finish(1))
    assert counts(meter, "a") == (10, 2, 4)


def test_those_with_most_service_are_named() -> None:
    meter = ServiceMeter(Fcfs())
    for number in range(1, 6):
        name = f"client-{number}"
        tell(meter, arrive(number, name, number), Admit(number, number))
        meter.on(Enact([(number, number, 0)]))
    assert [client.computed for client in meter.clients(most=3)] == [5, 4, 3]
    assert [client.client for client in meter.clients(name="client-1")] == ["client-1"]
    assert meter.clients(name="nobody") == []


def test_clients_that_are_gone_are_forgotten_in_time_and_beyond_a_number() -> None:
    meter = ServiceMeter(Fcfs())
    meter.on(arrive(1, "stays"))
    for number in range(2, MOST_IDLE + 7):
        tell(meter, arrive(number, f"client-{number}"), Abort(number))
    assert meter.num_clients == MOST_IDLE + 1
    assert meter.clients(name="client-6") == [] != meter.clients(name="client-7")
    meter.on(Tick(KNOWN_CLIENT_S - 1))
    assert meter.num_clients == MOST_IDLE + 1
    meter.on(Tick(KNOWN_CLIENT_S))
    assert [client.client for client in meter.clients()] == ["stays"]


# ------------------------------------------------------------------------------------- the window


def test_the_window_begins_when_the_last_of_those_who_wait_joined() -> None:
    meter = ServiceMeter(Fcfs())
    tell(meter, arrive(1, "a"), arrive(2, "a"), Admit(1, 10), Enact([(1, 10, 1)]))
    tell(meter, arrive(3, "b", at_s=2.0), arrive(4, "b", weight=1.0, at_s=2.0))
    assert meter.window().clients == 2 and meter.window().gap == 0  # 12 before they were two
    tell(meter, Admit(3, 6), Enact([(3, 6, 0), (1, 0, 1)]), Tick(5.0))
    window = meter.window()
    assert (window.clients, window.seconds, window.gap, window.bound) == (2, 3.0, 6 - 2, None)
    assert window.jain == pytest.approx((2 + 6) ** 2 / (2 * (4 + 36)))
    tell(meter, arrive(5, "c", at_s=6.0), Enact([(3, 0, 1)]), Tick(7.0))
    assert (meter.window().clients, meter.window().seconds, meter.window().gap) == (3, 1.0, 2)
    # It ends for c alone: the window of the other two goes on.
    tell(meter, Abort(5), Tick(8.0))
    assert (meter.window().clients, meter.window().seconds, meter.window().gap) == (2, 6.0, 8 - 2)
    tell(meter, Admit(2, 10), Tick(9.0))
    assert (meter.window().clients, meter.window().gap, meter.window().jain) == (1, 0, None)
    # A preempted request waits again, but has not waited all the time.
    tell(meter, Preempt(2), Tick(10.0))
    assert (meter.window().clients, meter.window().seconds) == (2, 1.0)


def test_service_is_compared_by_weight_and_anew_when_a_weight_changes() -> None:
    meter = ServiceMeter(Fcfs())
    tell(meter, arrive(1, "a", weight=3.0), arrive(2, "a", weight=3.0), arrive(3, "b"))
    tell(meter, Admit(1, 9), Enact([(1, 9, 0)]))
    assert meter.window().gap == 3
    tell(meter, arrive(4, "a", weight=1.0, at_s=4.0), Enact([(1, 0, 4)]))
    assert (meter.window().clients, meter.window().seconds, meter.window().gap) == (2, 0.0, 8)


def test_numbers_that_mean_nothing_are_left_out() -> None:
    meter = ServiceMeter(Fcfs())
    assert dict(meter.values()) == {
        "clients_known": 0,
        "clients_backlogged": 0,
        "service_window_seconds": 0,
        "service_gap_tokens": 0,
    }
    tell(meter, arrive(1, "a"), arrive(2, "b"))
    assert "jain_service" not in meter.values()  # nobody got anything


def test_only_so_many_clients_are_compared() -> None:
    meter = ServiceMeter(Vtc())
    for number in range(1, MOST_COMPARED + 10):
        meter.on(arrive(number, f"client-{number}"))
    assert meter.window().clients == MOST_COMPARED


# -------------------------------------------------------------------------------------- the bound


def traffic(order: Order, seed: int, *, weights: dict[str, float], steps: int = 45):
    """Clients that come and go, preemptions, aborts, evictions; the meter after every move."""
    rng = random.Random(seed)
    meter = ServiceMeter(order)
    engine, number = ToyEngine(meter, rng.randint(1, 5)), 0
    for step in range(steps):
        if step % 15 == 0:  # who was away comes back, who was alone is joined
            rates = {name: rng.choice([0.0, 0.1, 0.8, 2.0]) for name in weights}
        for name, weight in weights.items():
            while rng.random() < rates[name] / (1 + rates[name]):
                number += 1
                pages = [
                    rng.choice((name, "shared", str(number))) for _ in range(rng.randint(0, 6))
                ]
                engine.arrive(Work(number, name, tuple(pages), rng.randint(1, 10), weight=weight))
        engine.fill()
        yield meter
        engine.step()
        yield meter
        for chance, move, among in (
            (0.15, lambda one: engine.preempt(), engine.running),
            (0.15, engine.abort, engine.waiting),
            (0.1, engine.abort, engine.running),
            (0.15, engine.evict, engine.cached),
        ):
            if among and rng.random() < chance:
                move(rng.choice(sorted(among)))
                yield meter


@given(
    seed=st.integers(0, 10**6),
    quantum=st.integers(1, 200).map(float),
    scope=st.sampled_from(["queued", "queued_or_running"]),
    charge_at=st.sampled_from(["admit", "enacted"]),
    newcomer=st.sampled_from(["0", "quantum"]),
    heavy=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_dlpm_keeps_the_bound_that_it_says(
    seed, quantum, scope, charge_at, newcomer, heavy
) -> None:
    order = Dlpm(
        DlpmParameters(
            quantum=quantum, refill_scope=scope, charge_at=charge_at, new_client_credit=newcomer
        )
    )
    for meter in traffic(order, seed, weights={"a": heavy, "b": 1.0, "c": 1.0}):
        window = meter.window()
        assert window.bound is not None and window.gap <= window.bound + 1e-6


@given(
    seed=st.integers(0, 10**6),
    w_in=st.sampled_from([0.0, 1.0, 3.0]),
    price_cached=st.sampled_from([0.0, 1.0]),
    heavy=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_vtc_keeps_the_bound_that_it_says(seed, w_in, price_cached, heavy) -> None:
    order = Vtc(VtcParameters(w_in=w_in, price_cached=price_cached))
    for meter in traffic(order, seed, weights={"a": heavy, "b": 1.0, "c": 1.0}):
        window = meter.window()
        assert window.bound is not None and window.gap <= window.bound + 1e-6


def alone_then_joined(order: Order) -> ServiceMeter:
    """One client that always runs and never waits; then a second one, and both wait throughout."""
    meter = ServiceMeter(order)
    engine, number = ToyEngine(meter, slots=2), 0
    for step in range(150):
        while step < 100 and len(engine.running) < engine.slots:
            number += 1
            engine.arrive(Work(number, "f", (), 6))
            engine.fill()
        for name in "gf" if step >= 100 else "":
            while sum(work.client == name for work in engine.waiting.values()) < 3:
                number += 1
                engine.arrive(Work(number, name, (), 6))
        engine.fill()
        engine.step()
    return meter


def test_who_was_alone_for_long_does_not_wait_until_a_newcomer_got_as_much() -> None:
    window = alone_then_joined(Vtc()).window()
    assert window.clients == 2 and window.bound is not None and window.gap <= window.bound
    unlifted = alone_then_joined(Vtc(VtcParameters(idle_lift=False))).window()
    assert unlifted.gap > window.bound and unlifted.bound is None


def test_the_bound_is_worked_out_from_what_was_seen() -> None:
    meter = ServiceMeter(Dlpm(DlpmParameters(quantum=100.0)))
    tell(meter, *(arrive(number, "a", 10, weight=2.0) for number in (1, 2, 3)), arrive(4, "b", 7))
    for number, extend in ((1, 10), (2, 4)):
        meter.next()
        meter.on(Admit(number, extend))
    tell(meter, Enact([(1, 10, 5), (2, 4, 1)]))
    # Q + U by the least weight: an extend of 10, two rows of a client, 5 tokens the longest output
    assert meter.window().bound == 2 * (100 + 10 + 2 * 2 * 5)
    meter.on(Abort(4))
    assert meter.window().bound == 2 * (100 + (10 + 2 * 2 * 5) / 2)

    meter = ServiceMeter(Vtc())
    tell(meter, arrive(1, "a", 10), Admit(1, 4), Enact([(1, 4, 3)]), arrive(2, "a", 1))
    assert meter.window().bound == 2 * (10 + 2 * 3)
    meter.on(Finish(1))
    tell(meter, Admit(2, 1), Abort(2))  # its prompt was paid for and not run
    assert meter.values()["service_gap_bound_tokens"] == 2 * (10 + 2 * 3 + 1)


def test_a_smaller_weight_takes_the_credit_beyond_its_quantum() -> None:
    order = Dlpm(DlpmParameters(quantum=100.0, new_client_credit="quantum"))
    order.on(arrive(1, "a", weight=4.0))
    assert order.credit("a") == 400
    order.on(arrive(2, "a", weight=1.0))
    assert order.credit("a") == 100 and order.credit("nobody") is None
