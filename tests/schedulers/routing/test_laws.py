"""Every routing policy keeps the laws it claims; each law catches one that does not."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.schedulers.routing import Choice, Dispatch, Routable, Routing, Views
from jaxserve.schedulers.routing.catalog import ROUTINGS, make_routing
from jaxserve.schedulers.routing.d2lpm import D2lpm, D2lpmParameters
from jaxserve.schedulers.routing.laws import (
    CLIENTS,
    LAWS,
    LONGEST_PROMPT,
    MOST_OUTPUT,
    MOST_QUANTUM,
    OF_EVERYONE,
    PAGE,
    REPLICAS,
    ToyFleet,
    make_request,
    traffic,
)
from jaxserve.schedulers.routing.least_requests import LeastRequests

FULL = settings().max_examples > 100
FEW = settings() if FULL else settings(max_examples=4)
SOME = settings() if FULL else settings(max_examples=12)
"""Laws run long; a full run keeps its many examples."""

SEEDS = st.integers(0, 10**6)


@pytest.mark.parametrize(
    ("name", "law"), [(policy.name, law) for policy in ROUTINGS.values() for law in policy.laws]
)
@FEW
@given(seed=SEEDS)
def test_every_policy_keeps_its_laws(name: str, law: str, seed: int) -> None:
    tight = ROUTINGS[name].tight
    LAWS[law](lambda num, size: make_routing(name, tight, num_replicas=num, page_size=size), seed)


def test_everybody_claims_what_everybody_is_held_to() -> None:
    for policy in ROUTINGS.values():
        assert set(OF_EVERYONE) <= set(policy.laws) <= set(LAWS), policy.name


# ----------------------------------------------------------------------------------------- twins


class BlindToHealth(Routing):
    def choose(self, request: Routable, views: Views) -> Choice:
        return Choice(request.number % len(views))


class DrawsLots(Routing):
    def choose(self, request: Routable, views: Views) -> Choice:
        return Choice(int(random.choice(views.candidates)))


class Meddler(LeastRequests):
    """Counts what it chose a second time, in the columns it is shown."""

    def choose(self, request: Routable, views: Views) -> Choice:
        choice = super().choose(request, views)
        views.in_flight_tokens[choice.replica] += 1
        return choice


class NeverTheFirst(Routing):
    def choose(self, request: Routable, views: Views) -> Choice:
        return Choice(int(views.candidates[-1]) or 1)


class LovesCrowds(Routing):
    def choose(self, request: Routable, views: Views) -> Choice:
        return Choice(views.least(-views.waiting_tokens))


def tight_d2lpm(kind: type[D2lpm], num_replicas: int, page_size: int) -> D2lpm:
    parameters = D2lpmParameters(worker_quantum=MOST_QUANTUM)
    return kind(parameters, num_replicas=num_replicas, page_size=page_size)


class Generous(D2lpm):
    """Refills whoever is short, whether or not somebody else has credit."""

    def _refill(self, credits: np.ndarray, candidates: np.ndarray) -> None:
        credits += MOST_QUANTUM / 4


class Forgiving(D2lpm):
    """Debts are written off, so that the longest match may take all there is."""

    def sent(self, dispatch: Dispatch) -> None:
        super().sent(dispatch)
        row = self._rows[dispatch.request.client]
        np.maximum(self._credits[row], 1.0, out=self._credits[row])


TWINS = {
    "only_the_healthy_are_named": lambda num, size: BlindToHealth(),
    "same_events_same_choices": lambda num, size: DrawsLots(),
    "nothing_stays_in_flight": lambda num, size: Meddler(),
    "alone_takes_all": lambda num, size: NeverTheFirst(),
    "longer_queues_attract_nobody": lambda num, size: LovesCrowds(),
    "credit_stays_in_range": lambda num, size: tight_d2lpm(Generous, num, size),
    "replicas_share_each_client": lambda num, size: tight_d2lpm(Forgiving, num, size),
}


def breaks(law: str) -> bool:
    for seed in range(40):
        try:
            LAWS[law](TWINS[law], seed)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("law", LAWS)
def test_every_law_catches_a_policy_that_breaks_it(law: str) -> None:
    assert breaks(law)


# ------------------------------------------------------------------------------ d2lpm and limits

D2LPM = st.builds(
    D2lpmParameters,
    worker_quantum=st.integers(1, 300).map(float),
    router_charge=st.sampled_from(["full", "extend"]),
    w_in=st.sampled_from([1.0, 2.0]),
    w_out=st.sampled_from([1.0, 2.0, 3.0]),
)


class Ledger(D2lpm):
    """Keeps a second account: what each client was charged on each replica."""

    def __init__(self, parameters: D2lpmParameters):
        super().__init__(parameters, num_replicas=REPLICAS, page_size=PAGE)
        self.known = parameters
        self.charged = {client: np.zeros(REPLICAS) for client in CLIENTS}

    def sent(self, dispatch: Dispatch) -> None:
        super().sent(dispatch)
        full = self.known.router_charge == "full"
        tokens = dispatch.request.num_prompt_tokens if full else dispatch.num_extend_tokens
        self.charged[dispatch.request.client][dispatch.replica] += self.known.w_in * tokens

    def ended(self, dispatch: Dispatch, num_output_tokens: int) -> None:
        super().ended(dispatch, num_output_tokens)
        cost = self.known.w_out * num_output_tokens
        self.charged[dispatch.request.client][dispatch.replica] += cost


@SOME
@given(known=D2LPM, seed=SEEDS)
def test_credit_is_refills_less_charges_with_equal_refills_everywhere(known, seed) -> None:
    """And bounded, as is the gap between two replicas, under every setting: papers.md 3.6, 6.3."""
    routing = Ledger(known)
    fleet = ToyFleet(routing, random.Random(seed))
    for _ in traffic(fleet, changes=False):
        flight = max(fleet.most_live.values(), default=0)
        overdraft = known.w_in * LONGEST_PROMPT + known.w_out * flight * MOST_OUTPUT
        for client in CLIENTS:
            credit, charged = routing.credits(client), routing.charged[client]
            refilled = credit + charged
            assert (refilled == refilled[0]).all() and refilled[0] % known.worker_quantum == 0
            assert -overdraft <= credit.min() and credit.max() <= known.worker_quantum
            assert charged.max() - charged.min() <= known.worker_quantum + overdraft


@SOME
@given(seed=SEEDS)
def test_with_a_huge_quantum_the_longest_match_wins_then_the_shortest_queue(seed) -> None:
    parameters = D2lpmParameters(worker_quantum=1e12, new_replica_credit="quantum")
    routing = D2lpm(parameters, num_replicas=REPLICAS, page_size=PAGE)
    fleet = ToyFleet(routing, random.Random(seed))
    for _ in traffic(fleet, changes=True):
        request = make_request(random.Random(seed), 10**6)
        matched, queue = routing.matched(request), fleet.views.outstanding
        best = min(fleet.views.candidates, key=lambda w: (-matched[w], queue[w], w))
        assert routing.choose(request, fleet.views) == Choice(int(best), int(matched[best]))


@SOME
@given(seed=SEEDS)
def test_with_a_tiny_quantum_each_goes_where_its_client_was_charged_least(seed) -> None:
    routing = Ledger(D2lpmParameters(worker_quantum=1.0))
    fleet = ToyFleet(routing, random.Random(seed))
    for _ in traffic(fleet, changes=False):
        request = make_request(random.Random(seed), 10**6)
        charged = routing.charged[request.client].copy()
        assert charged[routing.choose(request, fleet.views).replica] == charged.min()


def same_choices(one: tuple[str, ...], other: tuple[str, ...], seed: int, **views: float) -> None:
    """Two policies over the same fleet choose the same, whatever the first one did."""
    first, second = (
        make_routing(name, options, num_replicas=REPLICAS, page_size=PAGE)
        for name, *options in (one, other)
    )
    fleet = ToyFleet(first, random.Random(seed))
    for replica in range(REPLICAS):
        fleet.report_now(replica)
    for _ in traffic(fleet, changes=False):
        for column, value in views.items():
            getattr(fleet.views, column)[:] = value
        request = replace(make_request(random.Random(seed), 10**6), page_keys=())
        chosen = [routing.choose(request, fleet.views).replica for routing in (first, second)]
        assert chosen[0] == chosen[1]


@FEW
@given(seed=SEEDS)
def test_policies_that_are_others_at_the_end_of_a_dial(seed: int) -> None:
    """papers.md 6.21."""
    load = ("least_load", "kv_weight_s=0")
    same_choices(load, ("least_tokens",), seed, prefill_rate=500.0)
    same_choices(("sal",), ("sal", "combiner=sum"), seed, kv_free_tokens=10**6)


@FEW
@given(seed=SEEDS)
def test_cache_aware_with_threshold_1_looks_at_load_alone(seed: int) -> None:
    routing = make_routing("cache_aware", ["threshold=1"], num_replicas=REPLICAS, page_size=PAGE)
    fleet = ToyFleet(routing, random.Random(seed))
    for _ in traffic(fleet, changes=True):
        views, request = fleet.views, make_request(random.Random(seed), 10**6)
        load = views.outstanding[views.candidates]
        assert views.outstanding[routing.choose(request, views).replica] == load.min()
