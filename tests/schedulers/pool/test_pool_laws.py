"""Every pool planner keeps the laws it claims; each law catches one that does not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.schedulers.pool.catalog import POOLS, make_pool
from jaxserve.schedulers.pool.laws import OF_EVERY_POOL, POOL_LAWS
from jaxserve.schedulers.pool.planner import PoolSetup
from jaxserve.schedulers.pool.request import Batch, PoolRequest, Ran
from jaxserve.schedulers.pool.scls import Scls, SclsParameters
from jaxserve.schedulers.pool.scls_resident import SclsResident, SclsResidentParameters

FEW = settings() if settings().max_examples > 100 else settings(max_examples=2)
SEEDS = st.integers(0, 10**6)


@pytest.mark.parametrize(
    ("name", "law"), [(policy.name, law) for policy in POOLS.values() for law in policy.laws]
)
@FEW
@given(seed=SEEDS)
def test_every_planner_keeps_its_laws(name: str, law: str, seed: int) -> None:
    POOL_LAWS[law](lambda setup: make_pool(name, POOLS[name].tight, setup), seed)


@pytest.mark.parametrize("option", ["step=so", "step=pm", "step=ab", "memory=pages", "refine=true"])
@FEW
@given(seed=SEEDS)
def test_every_step_keeps_the_laws_that_matter_most(option: str, seed: int) -> None:
    for law in ("everybody_ends_once", "batches_fit"):
        POOL_LAWS[law](lambda setup: make_pool("scls", (option,), setup), seed)


def test_everybody_claims_what_everybody_is_held_to() -> None:
    for policy in POOLS.values():
        assert set(OF_EVERY_POOL) <= set(policy.laws) <= set(POOL_LAWS), policy.name


# ---------------------------------------------------------------------------------------- twins


class Forgets(Scls):
    """Whoever has run once does not come back."""

    def ran(self, batch: Batch, what: Ran) -> None:
        super().ran(batch, what)
        for number in batch.rows:
            self._pool.pop(number, None)


class KeepsTheLeft(SclsResident):
    """Who hangs up keeps its pages."""

    def _forget(self, request: PoolRequest) -> None:
        assert request.holder is not None
        del self._residents[request.holder][request.number]
        request.holder = None


class Crams(Scls):
    """One batch of all that there is."""

    def _cheapest(self, requests):
        return [requests]


class DrawsLots(Scls):
    def _cheapest(self, requests):
        return [[request] for request in random.sample(list(requests), len(requests))]


class Sleeps(Scls):
    """Has an interval, and no wake-up."""

    def __init__(self, setup: PoolSetup):
        super().__init__(SclsParameters(wake=False, interval_gamma_s=5.0), setup)


TWINS = {
    "everybody_ends_once": lambda setup: Forgets(SclsParameters(), setup),
    "aborts_leave_no_trace": lambda setup: KeepsTheLeft(SclsResidentParameters(), setup),
    "batches_fit": lambda setup: Crams(SclsParameters(), setup),
    "same_events_same_plans": lambda setup: DrawsLots(SclsParameters(), setup),
    "no_instance_idles": Sleeps,
}


@pytest.mark.parametrize("law", POOL_LAWS)
def test_every_law_catches_a_planner_that_breaks_it(law: str) -> None:
    for seed in range(20):
        try:
            POOL_LAWS[law](TWINS[law], seed)
        except AssertionError:
            return
    pytest.fail(f"{law} let its twin pass")
