"""Every order keeps the laws it claims, and every law catches an order that breaks it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.catalog import ORDERS, make_order
from jaxserve.schedulers.events import Abort, Event
from jaxserve.schedulers.laws import LAWS, OF_EVERYONE
from jaxserve.schedulers.order.dlpm import Dlpm, DlpmParameters
from jaxserve.schedulers.order.fcfs import Fcfs
from jaxserve.schedulers.order.lpm import Lpm
from jaxserve.schedulers.toy_engine import PAGE

CLAIMS = [(policy.name, law) for policy in ORDERS.values() for law in policy.laws]


@pytest.mark.parametrize(("name", "law"), CLAIMS)
def test_every_order_keeps_its_laws(name: str, law: str) -> None:
    tight = ORDERS[name].tight

    @given(seed=st.integers(0, 10**6))
    def holds(seed: int) -> None:
        LAWS[law](lambda: make_order(name, tight, page_size=PAGE), seed)

    holds()


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
    "no_client_starves": Lpm,
    "no_request_starves": lambda: Dlpm(DlpmParameters(quantum=64.0)),
    "bounded_service_gap": Fcfs,
}


@pytest.mark.parametrize("law", LAWS)
def test_every_law_catches_an_order_that_breaks_it(law: str) -> None:
    def breaks(seed: int) -> bool:
        try:
            LAWS[law](TWINS[law], seed)
        except (AssertionError, KeyError, ValueError):
            return True
        return False

    assert any(breaks(seed) for seed in range(40))
