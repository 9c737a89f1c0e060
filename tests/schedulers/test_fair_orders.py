"""vtc and dlpm: the worked cases, their bounds, and what they turn into at the ends of a dial."""

import pytest

from jaxserve.schedulers.events import Abort, Admit, Arrive, Enact, Event, Finish, Preempt, Tick
from jaxserve.schedulers.order import Order
from jaxserve.schedulers.order.charges import KNOWN_CLIENT_S, MOST_IDLE
from jaxserve.schedulers.order.dlpm import Dlpm, DlpmParameters
from jaxserve.schedulers.order.vtc import Vtc, VtcParameters
from jaxserve.schedulers.prefix_tree import NO_PARENT, Stored
from jaxserve.schedulers.service_meter import ServiceMeter
from jaxserve.schedulers.toy_engine import ToyEngine, Work


def arrive(number: int, client: str, tokens: int, **fields: object) -> Arrive:
    return Arrive(number, client, 0, 0.0, tokens, 10, 1, **fields)


def tell(order: Order, *events: Event) -> None:
    for event in events:
        order.on(event)


# ------------------------------------------------------------------------------------------- vtc


def test_vtcs_worked_case() -> None:
    """papers.md 4.1: two clients, three decode steps, then two newcomers who are lifted."""
    order = Vtc()
    tell(order, *(arrive(number, "a", 10) for number in (1, 2, 3)), arrive(4, "b", 4))
    admitted = []
    for extend in (10, 4):  # a prefill cap of 14 lets in two
        number = order.next()
        assert number is not None
        order.on(Admit(number, extend))
        admitted.append(number)
    assert admitted == [1, 4] and order.counters() == {"a": 10, "b": 4}
    for _ in range(3):
        tell(order, Enact([(1, 0, 1)]), Enact([(4, 0, 1)]))
    assert order.counters() == {"a": 16, "b": 10}
    tell(order, arrive(5, "b", 4), arrive(6, "c", 6))
    assert order.counters() == {"a": 16, "b": 16, "c": 16}
    for number, extend in ((2, 10), (5, 4), (6, 6), (3, 10)):
        assert order.next() == number
        order.on(Admit(number, extend))
    assert order.counters() == {"a": 36, "b": 20, "c": 22}


def test_vtc_lifts_who_finds_the_system_idle_on_wish() -> None:
    for idle_lift, wanted in ((True, 14.0), (False, 0.0)):
        order = Vtc(VtcParameters(idle_lift=idle_lift))
        tell(order, arrive(1, "a", 10), Admit(1, 10), Enact([(1, 10, 2)]), Finish(1))
        order.on(arrive(2, "b", 5))
        assert order.counters()["b"] == wanted


def test_vtc_charges_by_weight_and_prices_what_is_cached() -> None:
    for price_cached, wanted in ((1.0, 5.0), (0.0, 2.0), (0.5, 3.5)):
        order = Vtc(VtcParameters(price_cached=price_cached))
        tell(order, arrive(1, "a", 10, weight=2.0), Admit(1, 4))
        assert order.counters()["a"] == wanted


@pytest.mark.parametrize("order", [Vtc(), Dlpm()])
def test_clients_that_are_gone_for_long_are_forgotten(order) -> None:
    for number in range(1, 6):
        tell(order, arrive(number, f"client-{number}", 5), Admit(number, 5), Finish(number))
    for _ in range(10):
        order.on(Tick(100.0))
    known = order.counters if isinstance(order, Vtc) else order.credits
    assert len(known()) == 5
    for _ in range(10):
        order.on(Tick(3601.0))
    assert not known()


@pytest.mark.parametrize("order", [Vtc(VtcParameters(lift=False)), Dlpm()])
def test_names_do_not_add_up_behind_a_client_that_stays(order) -> None:
    order.on(arrive(1, "stays", 5))
    for number in range(2, MOST_IDLE + 7):
        tell(order, arrive(number, f"client-{number}", 5), Abort(number))
    known = order.counters if isinstance(order, Vtc) else order.credits
    assert len(known()) == MOST_IDLE + 1
    assert "client-6" not in known() and "client-7" in known()
    tell(order, arrive(10**6, "client-7", 5), Tick(KNOWN_CLIENT_S))
    assert set(known()) == {"stays", "client-7"}


@pytest.mark.parametrize("order", [Vtc(VtcParameters(idle_lift=False)), Dlpm()])
def test_a_weight_that_changed_counts_from_then_on(order) -> None:
    tell(order, arrive(1, "a", 8), Admit(1, 8), Enact([(1, 8, 0)]), Finish(1))
    tell(order, arrive(2, "a", 8, weight=4.0), Admit(2, 8), Enact([(2, 8, 0)]), Finish(2))
    if isinstance(order, Vtc):
        assert order.counters()["a"] == 8 + 2
    else:
        order.on(arrive(3, "a", 8, weight=4.0))
        assert order.next() == 3 and order.credits()["a"] == 4 * 8192 - 16


def test_vtc_forgets_nobody_early_whom_an_empty_queue_would_not_lift() -> None:
    order = Vtc(VtcParameters(idle_lift=False))
    tell(order, arrive(1, "a", 5), Admit(1, 5), Enact([(1, 5, 0)]))
    order.on(arrive(2, "b", 9))  # lifted to nobody: nobody waits
    tell(order, Admit(2, 9), arrive(3, "b", 9), Finish(1))
    assert order.counters() == {"a": 5, "b": 9}


def test_who_gives_way_follows_a_change_of_weight() -> None:
    order = Dlpm(DlpmParameters(quantum=100.0, new_client_credit="quantum"))
    tell(order, arrive(1, "a", 5, weight=4.0), arrive(2, "b", 5), Admit(1, 5), Admit(2, 1))
    assert order.running() == [1, 2]
    order.on(arrive(3, "a", 5, weight=0.1))
    assert order.running() == [2, 1]


# ------------------------------------------------------------------------------------------ dlpm


def matched(tokens: int) -> tuple[bytes, ...]:
    return tuple(b"%d" % page for page in range(tokens))


def test_dlpms_worked_case() -> None:
    """papers.md 3.8: one request overdraws, and a client with credit goes before a longer match."""
    order = Dlpm(DlpmParameters(quantum=4.0, charge_at="enacted"))
    for number, client, match in ((1, "a", 100), (2, "a", 90), (3, "b", 80)):
        keys = tuple(f"{client}{number}{page}".encode() for page in range(match))
        order.on(arrive(number, client, match + 3, page_keys=keys, num_cached=match))
    planned, planning = [], []
    while (number := order.next()) is not None:
        planned.append(number)
        planning.append(4 - order.charged("a"))
        order.on(Admit(number, 3))
    assert planned == [1, 2, 3] and planning == [4, 1, -2]
    assert order.credits() == {"a": 4, "b": 4} and 4 - order.charged("b") == 1
    tell(order, Enact([(1, 3, 0)]), Enact([(3, 2, 0)]), Preempt(2, 90), Preempt(3, 80))
    assert order.credits() == {"a": 1, "b": 2}
    order.on(Enact([(1, 0, 2)]))
    assert order.credits() == {"a": -3, "b": 2}
    assert order.next() == 3  # a has the longer match, b the credit; and nobody was refilled
    assert order.credits() == {"a": -3, "b": 2}
    tell(order, Admit(3, 3), Finish(1), Abort(2))
    assert 4 - order.charged("b") == 1  # the token that was not run before
    order.on(Abort(3))
    assert {client: 4 - order.charged(client) for client in "ab"} == order.credits()


def test_a_newcomer_waits_for_the_others_credit_unless_it_gets_a_quantum() -> None:
    for new_client_credit, wanted in (("0", 2), ("quantum", 9)):
        order = Dlpm(DlpmParameters(quantum=100.0, new_client_credit=new_client_credit))
        tell(order, arrive(1, "a", 5), arrive(2, "a", 5))
        assert order.next() == 1
        order.on(Admit(1, 5))
        order.on(arrive(9, "b", 5, page_keys=matched(1), num_cached=1))
        assert order.next() == wanted


def test_a_refill_is_for_all_who_are_known_and_have_no_credit() -> None:
    order = Dlpm(DlpmParameters(quantum=4.0))
    order.on(arrive(1, "away", 7))
    assert order.next() == 1
    tell(order, Admit(1, 7), Enact([(1, 7, 0)]), Finish(1))
    assert order.next() is None and order.credits() == {"away": -3.0}
    order.on(arrive(2, "a", 3))
    assert order.next() == 2 and order.credits() == {"away": 1.0, "a": 4.0}
    tell(order, Admit(2, 4), arrive(3, "a", 3))
    assert order.next() == 3 and order.credits() == {"away": 1.0, "a": 4.0}


@pytest.mark.parametrize("weight", [1.0, 1e-300, 1e300])
def test_whoever_waits_is_named_however_deep_it_is_in_debt(weight: float) -> None:
    order = Dlpm(DlpmParameters(quantum=1e-3, w_in=1e9))
    for number, extend in enumerate((123457, 10**7 + 1, 3), 1):
        order.on(arrive(number, "a", extend, weight=weight))
        assert order.next() == number
        tell(order, Admit(number, extend), Enact([(number, extend, 1)]), Finish(number))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((DlpmParameters, "quantum", value) for value in (1e-320, 9e-4, 2e12, float("nan"))),
        *((DlpmParameters, name, 2e9) for name in ("w_in", "w_out", "price_cached")),
        *((VtcParameters, name, 2e9) for name in ("w_in", "w_out", "price_cached")),
    ],
)
def test_numbers_that_cannot_be_reckoned_with_are_refused(kind, name, value) -> None:
    with pytest.raises(ValueError, match=f"{name}: got .*; allowed: .* 1e"):
        kind(**{name: value})


def test_who_only_runs_blocks_refills_on_wish() -> None:
    for refill_scope, wanted in (("queued", 2), ("queued_or_running", None)):
        order = Dlpm(DlpmParameters(quantum=100.0, refill_scope=refill_scope))
        order.on(arrive(1, "a", 5))
        assert order.next() == 1
        tell(order, Admit(1, 5), arrive(2, "b", 5))
        assert order.next() == wanted


def test_prompts_are_charged_on_admission_or_as_they_run() -> None:
    for charge_at, wanted in (("admit", 5.0), ("enacted", 10.0)):
        order = Dlpm(DlpmParameters(quantum=10.0, charge_at=charge_at))
        order.on(arrive(1, "a", 5))
        assert order.next() == 1
        order.on(Admit(1, 5))
        assert order.credits()["a"] == wanted
        order.on(Enact([(1, 5, 0)]))
        assert order.credits()["a"] == 5.0


@pytest.mark.parametrize("charge_at", ["admit", "enacted"])
def test_what_was_not_run_is_given_back_and_nothing_is_paid_twice(charge_at) -> None:
    order = Dlpm(DlpmParameters(quantum=100.0, charge_at=charge_at))
    order.on(arrive(1, "a", 10))
    assert order.next() == 1
    tell(order, Admit(1, 10), Enact([(1, 4, 0)]), Preempt(1))
    assert order.credits()["a"] == 96
    tell(order, Admit(1, 10), Enact([(1, 10, 3)]), Preempt(1))
    assert order.credits()["a"] == 90 - 6
    tell(order, Admit(1, 13), Enact([(1, 13, 1)]))
    assert order.credits()["a"] == 84 - 2


@pytest.mark.parametrize("charge_at", ["admit", "enacted"])
def test_samples_that_are_let_in_again_pay_for_no_token_twice(charge_at) -> None:
    """Three samples share a prompt of 10; preempted after two tokens each, they share nothing."""
    meter = ServiceMeter(Dlpm(DlpmParameters(quantum=100.0, charge_at=charge_at)))
    tell(meter, Arrive(1, "a", 0, 0.0, 10, 10, 3))
    assert meter.next() == 1
    tell(meter, Admit(1, 12), Enact([(1, 5, 0)]), Preempt(1), Admit(1, 12))
    tell(meter, Enact([(1, 12, 3), (1, 0, 3)]), Preempt(1))
    before = meter.order.credit("a")
    assert before == 100 - 12 - 2 * 6
    tell(meter, Admit(1, 3 * 10 + 6), Enact([(1, 36, 0)]))
    assert meter.order.credit("a") == before
    assert (meter.clients()[0].computed, meter.clients()[0].output) == (12, 6)


def test_what_was_found_cached_is_given_back_where_nothing_ran() -> None:
    order = Dlpm(DlpmParameters(quantum=100.0, price_cached=0.5))
    order.on(arrive(1, "a", 10))
    assert order.next() == 1
    tell(order, Admit(1, 4), Preempt(1))
    assert order.credits() == {"a": 100.0}
    tell(order, Admit(1, 2), Enact([(1, 1, 0)]), Preempt(1))
    assert order.credits() == {"a": 100 - 4 - 1}
    tell(order, Admit(1, 8), Preempt(1))  # settled: what it found then was used
    assert order.credits() == {"a": 100 - 4 - 1}


def test_a_request_that_waited_long_goes_first_among_its_clients_on_wish() -> None:
    for limit_s, wanted in ((0.0, 3), (5.0, 1)):
        order = Dlpm(DlpmParameters(quantum=1e6, client_age_limit_s=limit_s))
        engine = ToyEngine(order, slots=1)
        engine.cached = {b"hot"}
        engine.arrive(Work(1, "a", ("cold",), 3))
        engine.now_s = 10.0
        engine.arrive(Work(2, "a", ("hot",), 1))
        engine.fill()
        assert engine.admitted == ([2] if not limit_s else [1])
        while engine.running:
            engine.step()
        engine.arrive(Work(3, "a", ("hot",), 1))
        if limit_s:
            engine.arrive(Work(4, "a", ("hot",), 1))
            assert engine.fill() == [2]
        else:
            assert engine.fill() == [wanted]


def test_cached_prefixes_cost_what_they_are_priced() -> None:
    for price_cached, wanted in ((0.0, 96.0), (0.5, 93.0)):
        order = Dlpm(DlpmParameters(quantum=100.0, price_cached=price_cached))
        order.on(arrive(1, "a", 10))
        assert order.next() == 1
        order.on(Admit(1, 4))
        assert order.credits()["a"] == wanted


def test_a_cache_change_reaches_every_client() -> None:
    order = Dlpm(DlpmParameters(quantum=100.0, new_client_credit="quantum"))
    order.on(arrive(1, "a", 9, page_keys=(b"x",)))
    order.on(arrive(2, "b", 9, page_keys=(b"y",)))
    assert order.next() == 1
    order.on(Stored(1, NO_PARENT, (b"y",)))
    assert order.next() == 2
