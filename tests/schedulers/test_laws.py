"""Every order keeps the laws it claims, and every law catches an order that breaks it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.schedulers.catalog import ORDERS, make_order
from jaxserve.schedulers.events import Abort, Event
from jaxserve.schedulers.laws import LAWS, OF_EVERYONE
from jaxserve.schedulers.order.dlpm import Dlpm, DlpmParameters
from jaxserve.schedulers.order.fcfs import Fcfs
from jaxserve.schedulers.order.lpm import Lpm
from jaxserve.schedulers.toy_engine import PAGE

FEW = settings() if settings().max_examples > 100 else settings(max_examples=10)
"""Laws run long; a full run keeps its many examples."""

CLAIMS = [(policy.name, law) for policy in ORDERS.values() for law in policy.laws]


@pytest.mark.parametrize(("name", "law"), CLAIMS)
@FEW
@given(seed=st.integers(0, 10**6))
def test_every_order_keeps_its_laws(name: str, law: str, seed: int) -> None:
    LAWS[law](lambda: make_order(name, ORDERS[name].tight, page_size=PAGE), seed)


def test_every_order_claims_what_everyone_is_held_to() -> None:
    for policy in ORDERS.values():
        assert set(OF_EVERYONE) <= set(policy.laws) <= set(LAWS), policy.name


# ---------------------------------------------------------------------------------------- twins


class ForgetsAborts(Fcfs):
    def on(self, event: Event) -> None:
        if not isinstance(event, Abort):
            super().on(event)


class DrawsLots(Fcfs):
    draws = 0

    def next(self) -> int | None:
        DrawsLots.draws += 1
        *_, last = [None, *super().waiting()]
        return last if DrawsLots.draws % 3 == 0 else super().next()


class Dawdles(Fcfs):
    calls = 0

    def next(self) -> int | None:
        self.calls += 1
        return None if self.calls % 4 == 0 else super().next()


TWINS = {
    "everybody_is_in_one_place": ForgetsAborts,
    "same_events_same_plans": DrawsLots,
    "aborts_leave_no_trace": ForgetsAborts,
    "work_conserving": Dawdles,
    "no_client_starves": lambda: Lpm(page_size=PAGE),
    "no_request_starves": lambda: Dlpm(DlpmParameters(quantum=64.0)),
    "bounded_service_gap": Fcfs,
    "shares_evenly": Fcfs,
}


def test_every_law_has_a_twin() -> None:
    assert set(TWINS) == set(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_every_law_catches_an_order_that_breaks_it(law: str) -> None:
    twin = TWINS[law]

    def breaks(seed: int) -> bool:
        try:
            LAWS[law](twin, seed)
        except (AssertionError, KeyError, ValueError):
            return True
        return False

    assert any(breaks(seed) for seed in range(40))
