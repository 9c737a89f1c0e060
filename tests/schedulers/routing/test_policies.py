"""Routing policies one by one: the worked cases of papers.md 2.2, 3.8, 4.3 and 4.4, and every
parameter in a case where it changes a choice."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.prefix_tree import NO_PARENT, Stored
from jaxserve.schedulers.routing import Dispatch, LoadReport, Routable, Routing, Views
from jaxserve.schedulers.routing.cache_aware import CacheAware, CacheAwareParameters
from jaxserve.schedulers.routing.catalog import ROUTINGS, make_routing, require_told
from jaxserve.schedulers.routing.conversation_affinity import (
    ConversationAffinity,
    ConversationAffinityParameters,
)
from jaxserve.schedulers.routing.d2lpm import D2lpm, D2lpmParameters
from jaxserve.schedulers.routing.least_load import LeastLoad, LeastLoadParameters
from jaxserve.schedulers.routing.sal import Sal, SalParameters

PAGE = 4
HOT = (b"1", b"2", b"3", b"4")
HOT_TOKENS = len(HOT) * PAGE + 1


class Desk:
    """Routes and sends, as the router does."""

    def __init__(self, routing: Routing, num_replicas: int):
        self.routing, self.views = routing, Views(num_replicas)
        self.sent: list[Dispatch] = []

    def choose(self, tokens: int = HOT_TOKENS, **fields) -> int:
        return self.routing.choose(self._request(tokens, **fields), self.views).replica

    def route(self, tokens: int = HOT_TOKENS, **fields) -> int:
        request = self._request(tokens, **fields)
        return self._send(request, *self.routing.choose(request, self.views))

    def load(self, *numbers: int) -> None:
        """So many requests of somebody else are sent to each replica."""
        for replica, number in enumerate(numbers):
            for _ in range(number):
                request = self._request(0, client="other")
                self.routing.choose(request, self.views)
                self._send(request, replica, 0)

    def report(self, replica: int, **fields) -> None:
        known = dict.fromkeys([field.name for field in dataclasses.fields(LoadReport)], 0)
        rates = dict(prefill_rate=0.0, release_rate=0.0, decode_rate=0.0)
        received = int(self.views.dispatched[replica])
        given = {**known, **rates, "at_s": 0.0, "num_received": received, **fields}
        self.views.report(replica, LoadReport(**given))

    def end(self, place: int, num_output_tokens: int) -> None:
        dispatch = self.sent[place]
        self.views.ended(dispatch.replica)
        self.routing.ended(dispatch, num_output_tokens)

    def _request(self, tokens: int, client: str = "a", **fields) -> Routable:
        number = len(self.sent)
        return Routable(number=number, client=client, num_prompt_tokens=tokens, **fields)

    def _send(self, request: Routable, replica: int, num_cached: int) -> int:
        extend, prompt = request.num_prompt_tokens - num_cached, request.num_prompt_tokens
        number = self.views.sent(replica, num_extend_tokens=extend, num_prompt_tokens=prompt)
        dispatch = Dispatch(request, replica, number, num_cached)
        self.routing.sent(dispatch)
        self.sent.append(dispatch)
        return replica


def desk(name: str, *options: str, num_replicas: int = 3) -> Desk:
    routing = make_routing(name, options, num_replicas=num_replicas, page_size=PAGE)
    return Desk(routing, num_replicas)


def warm(routing: Routing, *replicas: int, keys: Sequence[bytes] = HOT) -> None:
    """These replicas hold the hot prefix."""
    for replica in replicas:
        routing.cache_changed(replica, Stored(1, NO_PARENT, tuple(keys)), 0)


# ------------------------------------------------------------------------------------------- sal


@pytest.mark.parametrize("name", ["sal", "least_tokens", "least_load", "least_kv"])
def test_between_two_reports_nothing_herds(name: str) -> None:
    """papers.md 2.2 (a): ten requests of 1,000 tokens to two equal workers."""
    fleet = desk(name, num_replicas=2)
    for replica in range(2):
        fleet.report(replica, kv_free_tokens=10**5, kv_total_tokens=10**5)
    assert Counter(fleet.route(1000) for _ in range(10)) == {0: 5, 1: 5}


def test_without_the_correction_all_go_to_one() -> None:
    fleet = desk("sal", "in_flight=false", "ties=index", num_replicas=2)
    assert Counter(fleet.route(1000) for _ in range(10)) == {0: 10}


def test_sal_weighs_work_and_memory_by_its_combiner() -> None:
    """papers.md 2.2 (b)."""
    scores = {}
    for combiner in ("max", "sum"):
        fleet = Desk(Sal(SalParameters(combiner=combiner)), 2)
        free = dict(kv_free_tokens=10**5, kv_total_tokens=10**5)
        fleet.report(0, waiting_tokens=7200, prefill_rate=8000.0, **free)
        short = dict(waiting_prompt_tokens=5000, kv_free_tokens=4100, release_rate=2000.0)
        fleet.report(1, waiting_tokens=4000, prefill_rate=8000.0, kv_total_tokens=10**5, **short)
        request = Routable(number=0, client="a", num_prompt_tokens=300)
        scores[combiner] = fleet.routing.scores(request, fleet.views)  # type: ignore[attr-defined]
        assert fleet.choose(300) == ("max", "sum").index(combiner) ^ 1
    np.testing.assert_allclose(scores["max"], [0.9, 0.6])
    np.testing.assert_allclose(scores["sum"], [0.9, 1.1])


@given(
    combiner=st.sampled_from(["max", "sum"]),
    mean_output=st.booleans(),
    known=st.lists(st.integers(0, 5000), min_size=5, max_size=5),
    column=st.sampled_from(
        ["waiting_tokens", "in_flight_tokens", "waiting_prompt_tokens", "num_waiting", "in_flight"]
    ),
    more=st.integers(1, 5000),
)
def test_sals_score_does_not_fall_when_there_is_more_to_do_or_less_memory(
    combiner, mean_output, known, column, more
) -> None:
    """papers.md 6.9."""
    fleet = Desk(Sal(SalParameters(combiner=combiner, mean_output=mean_output)), 1)
    fleet.load(1)
    fleet.end(0, 100)
    waiting, prompts, num_waiting, free, tokens = known
    queue = dict(waiting_tokens=waiting, waiting_prompt_tokens=prompts, num_waiting=num_waiting)
    fleet.report(0, kv_free_tokens=free, kv_total_tokens=5000, **queue)
    request = Routable(number=9, client="a", num_prompt_tokens=tokens)

    def score() -> float:
        return float(fleet.routing.scores(request, fleet.views)[0])  # type: ignore[attr-defined]

    scores = [score()]
    getattr(fleet.views, column)[0] += more
    scores.append(score())
    fleet.views.kv_free_tokens[0] -= min(free, more)
    scores.append(score())
    assert scores == sorted(scores)


# ------------------------------------------------------------------------------------ least_load


def test_least_load_in_seconds() -> None:
    """papers.md 4.4."""
    fleet = Desk(LeastLoad(LeastLoadParameters()), 2)
    fleet.report(0, waiting_tokens=4000, kv_free_tokens=50, kv_total_tokens=100)
    fleet.report(1, waiting_tokens=1000, kv_free_tokens=5, kv_total_tokens=100)
    scores = fleet.routing.scores(fleet.views)  # type: ignore[attr-defined]
    np.testing.assert_allclose(scores, [2.15, 3.35])
    assert fleet.route() == 0


def test_least_load_guesses_for_who_has_not_reported() -> None:
    fleet = desk("least_load")
    fleet.load(3, 2, 4)
    assert fleet.choose() == 1  # nobody has: fewest requests
    fleet.report(0, waiting_tokens=2500, prefill_rate=1000.0)
    assert fleet.choose() == 1  # 2.5 s against 2 * 1024 / 1000 and 4 * 1024 / 1000
    fleet.report(0, at_s=1.0, waiting_tokens=2000, prefill_rate=1000.0)
    assert fleet.choose() == 0


# ----------------------------------------------------------------------------------- cache_aware


def cache_aware(**parameters) -> Desk:
    known = CacheAwareParameters(**parameters)
    return Desk(CacheAware(known, num_replicas=3, page_size=PAGE), 3)


def test_cache_aware_follows_a_long_match_while_loads_are_balanced() -> None:
    fleet = cache_aware(balance_abs=2.0)
    warm(fleet.routing, 1)
    fleet.load(0, 2, 2)
    assert fleet.choose(page_keys=HOT) == 1
    assert fleet.choose(page_keys=(b"cold",)) == 0
    assert fleet.choose(tokens=100, page_keys=HOT) == 0  # less than 0.3 of it
    fleet.load(0, 1, 0)
    assert fleet.choose(page_keys=HOT) == 0  # 3 more than the least, and more than 1.5 times
    fleet.load(2, 0, 0)
    assert fleet.choose(page_keys=HOT) == 1  # 2, 3, 2


def test_cache_aware_breaks_ties_by_load_then_by_what_is_cached_or_was_sent() -> None:
    fleet = cache_aware()
    warm(fleet.routing, 0, 2)
    warm(fleet.routing, 0, keys=(b"more",))
    assert fleet.choose(page_keys=HOT) == 2
    fleet.load(0, 0, 1)
    assert fleet.choose(page_keys=HOT) == 0
    fleet.end(0, 1)
    assert fleet.choose(page_keys=()) == 0
    fleet.load(1, 1, 0)
    fleet.end(1, 1)
    fleet.end(2, 1)  # all have sent one and none is there
    assert [fleet.route(page_keys=()) for _ in range(3)] == [0, 1, 2]


def test_cache_aware_looks_at_memory_on_wish() -> None:
    for parameters in (dict(overload=0.8), dict(spread=0.5)):
        fleet = cache_aware(**parameters)
        warm(fleet.routing, 1)
        fleet.load(0, 1, 1)
        for replica, free in enumerate((70, 30, 70)):
            fleet.report(replica, kv_free_tokens=free, kv_total_tokens=100)
        assert fleet.choose(page_keys=HOT) == 1
        fleet.report(1, at_s=1.0, kv_free_tokens=10, kv_total_tokens=100)
        assert fleet.choose(page_keys=HOT) == 0


def test_cache_aware_learns_from_what_it_sent_and_forgets_who_is_gone() -> None:
    fleet = cache_aware()
    fleet.load(0, 1, 1)
    assert fleet.route(page_keys=HOT) == 0
    fleet.load(3, 0, 0)
    assert fleet.route(page_keys=HOT) == 0
    fleet.views.lost(0)
    fleet.routing.lost(0, [])
    assert fleet.choose(page_keys=HOT) == 1


# ----------------------------------------------------------------------------------------- d2lpm


def test_d2lpm_by_hand() -> None:
    """papers.md 3.8: quantum 10, prices 2, X and Y hold the match, queues 5, 1, 0."""
    known = D2lpmParameters(worker_quantum=10.0, w_in=2.0, w_out=2.0)
    routing = D2lpm(known, num_replicas=3, page_size=PAGE)
    fleet = Desk(routing, 3)
    warm(routing, 0, 1)
    fleet.load(5, 1, 0)
    for tokens, chosen, credit in [
        (6, 1, [10, -2, 10]),
        (6, 0, [-2, -2, 10]),
        (10, 2, [-2, -2, -10]),
    ]:
        assert fleet.route(tokens, page_keys=HOT) == chosen
        assert list(routing.credits("a")) == credit
    assert fleet.choose(6, page_keys=HOT) == 1  # one round, and the shortest queue again
    assert list(routing.credits("a")) == [8, 8, 0]
    fleet.end(6, 3)  # the first of the client's, on Y
    assert list(routing.credits("a")) == [8, 2, 0]


def test_d2lpm_falls_back_to_the_shortest_queue_not_to_the_second_match() -> None:
    fleet = desk("d2lpm", "worker_quantum=10")
    warm(fleet.routing, 0)
    warm(fleet.routing, 1, keys=HOT[:2])
    fleet.load(0, 1, 0)
    assert fleet.route(page_keys=HOT) == 0
    assert fleet.route(page_keys=HOT) == 2


def test_d2lpm_refills_who_is_away_and_gives_it_a_quantum_at_most_when_it_returns() -> None:
    fleet = desk("d2lpm", "worker_quantum=10", num_replicas=2)
    credits = fleet.routing.credits  # type: ignore[attr-defined]
    fleet.views.set_healthy(1, False)
    for _ in range(3):
        assert fleet.route(10) == 0
    assert list(credits("a")) == [0, 30]
    fleet.views.set_healthy(1, True)
    fleet.routing.returned(1)
    assert list(credits("a")) == [0, 10]
    fleet.routing.lost(1, [])
    fleet.routing.joined(1)
    fleet.routing.joined(2)
    assert list(credits("a")) == [0, 0, 0]


def test_d2lpm_forgets_clients_that_were_away() -> None:
    fleet = desk("d2lpm", "worker_quantum=10", num_replicas=2)
    credits = fleet.routing.credits  # type: ignore[attr-defined]
    fleet.route(30)
    fleet.route(30, client="b")
    fleet.end(0, 1)
    fleet.views.now_s = 3601.0
    fleet.route(30, client="c")
    assert not credits("a").any() and credits("b").any()
    for replica in range(2):
        fleet.routing.lost(replica, [it for it in fleet.sent[1:] if it.replica == replica])
    fleet.views.now_s = 9000.0
    fleet.route(30, client="d")
    assert not credits("b").any() and not credits("c").any()


# -------------------------------------------------------------------------------------- the others


def test_round_robin_goes_round_the_healthy() -> None:
    fleet = desk("round_robin", num_replicas=4)
    assert [fleet.route() for _ in range(5)] == [0, 1, 2, 3, 0]
    fleet.views.set_healthy(1, False)
    assert [fleet.route() for _ in range(4)] == [2, 3, 0, 2]


def test_random_is_even_and_repeats_by_seed() -> None:
    routes = [[desk("random", f"seed={seed}").route() for _ in range(1)] for seed in range(300)]
    assert min(Counter(route for (route,) in routes).values()) > 70
    one, other = desk("random", "seed=5"), desk("random", "seed=5")
    assert [one.route() for _ in range(50)] == [other.route() for _ in range(50)]


def test_power_of_two_never_takes_the_fullest() -> None:
    fleet = desk("power_of_two")
    fleet.load(1, 5, 2)
    assert {fleet.choose() for _ in range(50)} == {0, 2}


def test_a_burst_spreads_over_who_has_fewest_requests() -> None:
    fleet = desk("least_requests")
    fleet.load(2, 0, 1)
    assert [fleet.route() for _ in range(4)] == [1, 1, 2, 0]


def test_least_kv_counts_shares() -> None:
    fleet = desk("least_kv", num_replicas=2)
    fleet.report(0, kv_free_tokens=40, kv_total_tokens=100)
    fleet.report(1, kv_free_tokens=100, kv_total_tokens=1000)
    assert fleet.route(tokens=25) == 0
    assert fleet.route(tokens=25) == 0
    assert fleet.route(tokens=25) == 1


def affinity(num_replicas: int, eps: float) -> Desk:
    known = ConversationAffinityParameters(eps=eps)
    return Desk(ConversationAffinity(known, num_replicas=num_replicas), num_replicas)


def test_a_session_stays_until_its_replica_is_full_or_gone() -> None:
    fleet = affinity(4, 0.5)
    homes = {str(it): fleet.choose(session=str(it)) for it in range(40)}
    assert set(homes.values()) == {0, 1, 2, 3}
    home = fleet.route(session="7")
    most = max(Counter(fleet.route(session="7") for _ in range(19)).values())
    assert most <= 8  # 1.5 times the mean of 20 over 4
    for place in range(20):
        fleet.end(place, 1)
    fleet.views.set_healthy(home, False)
    moved = {name: fleet.choose(session=name) for name in homes}
    assert all(moved[name] == homes[name] or homes[name] == home for name in homes)
    assert fleet.choose() == (home == 0)  # without a session: fewest requests


def test_a_replica_that_joins_takes_its_share_of_sessions_from_all() -> None:
    fleet = affinity(3, 0.5)
    before = [fleet.choose(session=str(it)) for it in range(100)]
    fleet.views.joined(3)
    fleet.routing.joined(3)
    after = [fleet.choose(session=str(it)) for it in range(100)]
    assert all(new in (old, 3) for old, new in zip(before, after, strict=True))
    assert 10 <= after.count(3) <= 45


# -------------------------------------------------------------------------------------- parameters


def drawn(fleet: Desk) -> object:
    return [fleet.route() for _ in range(30)]


def reports(fleet: Desk, *columns: dict) -> None:
    for replica, fields in enumerate(columns):
        fleet.report(replica, kv_total_tokens=1000, **fields)


def queue_or_memory(fleet: Desk) -> object:
    reports(
        fleet,
        dict(waiting_tokens=7200, kv_free_tokens=1000),
        dict(waiting_tokens=4000, waiting_prompt_tokens=1700),
        dict(waiting_tokens=9000, kv_free_tokens=1000),
    )
    return fleet.choose()


def outputs_count(fleet: Desk) -> object:
    fleet.route(0)
    fleet.end(0, 2000)
    reports(
        fleet,
        dict(waiting_tokens=800, num_waiting=1, kv_free_tokens=2500),
        dict(waiting_tokens=900, kv_free_tokens=2500),
        dict(waiting_tokens=8000, kv_free_tokens=2500),
    )
    return fleet.choose()


def burst(fleet: Desk) -> object:
    reports(fleet, *[dict(kv_free_tokens=1000)] * 3)
    return [fleet.route() for _ in range(5)]


def nothing_to_do(fleet: Desk) -> object:
    reports(fleet, *[dict(kv_free_tokens=1000)] * 3)
    fleet.load(1, 0, 1)
    return fleet.choose(0)


def memory_or_queue(fleet: Desk) -> object:
    reports(
        fleet,
        dict(waiting_tokens=1000, kv_free_tokens=50, prefill_rate=9000.0),
        dict(waiting_tokens=1000, kv_free_tokens=500),
        dict(waiting_tokens=9000, kv_free_tokens=1000, prefill_rate=9000.0),
    )
    return fleet.choose()


def one_has_reported(fleet: Desk) -> object:
    fleet.load(1, 3, 3)
    reports(fleet, dict(waiting_tokens=1500, kv_free_tokens=1000, prefill_rate=1000.0))
    return fleet.choose()


def full_house(fleet: Desk) -> object:
    return Counter(fleet.route(session="x") for _ in range(30))


def many_sessions(fleet: Desk) -> object:
    return [fleet.choose(session=str(it)) for it in range(30)]


def half_matched(fleet: Desk) -> object:
    warm(fleet.routing, 1, keys=HOT[:2])
    fleet.load(0, 8, 8)
    reports(fleet, *[dict(kv_free_tokens=free) for free in (600, 100, 600)])
    return fleet.choose(tokens=20, page_keys=HOT)


def matched_and_busy(fleet: Desk) -> object:
    warm(fleet.routing, 1)
    fleet.load(2, 8, 8)
    return fleet.choose(page_keys=HOT)


def little_matched(fleet: Desk) -> object:
    warm(fleet.routing, 1)
    fleet.load(0, 1, 1)
    return fleet.choose(tokens=100, page_keys=HOT)


def old_prefix(fleet: Desk) -> object:
    warm(fleet.routing, 2)
    warm(fleet.routing, 1, keys=(b"x", b"y"))
    return fleet.choose(page_keys=HOT)


def hot_client(fleet: Desk) -> object:
    warm(fleet.routing, 1)
    chosen = []
    for place in range(12):
        chosen.append(fleet.route(page_keys=HOT))
        fleet.end(place, 3)
    return chosen


def newly_joined(fleet: Desk) -> object:
    fleet.route()
    fleet.views.joined(3)
    fleet.routing.joined(3)
    return [fleet.route() for _ in range(3)]


Case = tuple[Callable[[Desk], object], tuple[str, ...], tuple[str, ...]]
CASES: dict[tuple[str, str], Case] = {
    ("random", "seed"): (drawn, (), ("seed=1",)),
    ("power_of_two", "seed"): (drawn, (), ("seed=1",)),
    ("least_load", "kv_weight_s"): (memory_or_queue, (), ("kv_weight_s=0",)),
    ("least_load", "throughput"): (memory_or_queue, (), ("throughput=200",)),
    ("least_load", "request_tokens"): (one_has_reported, (), ("request_tokens=100",)),
    ("conversation_affinity", "eps"): (full_house, (), ("eps=2",)),
    ("conversation_affinity", "points"): (many_sessions, (), ("points=7",)),
    ("cache_aware", "threshold"): (half_matched, (), ("threshold=0.5",)),
    ("cache_aware", "balance_abs"): (half_matched, (), ("balance_abs=4",)),
    ("cache_aware", "balance_rel"): (
        matched_and_busy,
        ("balance_abs=4",),
        ("balance_abs=4", "balance_rel=9"),
    ),
    ("cache_aware", "overload"): (half_matched, (), ("overload=0.8",)),
    ("cache_aware", "spread"): (half_matched, (), ("spread=0.4",)),
    ("cache_aware", "match"): (little_matched, (), ("match=overlap",)),
    ("cache_aware", "tree_pages"): (old_prefix, (), ("tree_pages=2",)),
    ("sal", "combiner"): (queue_or_memory, (), ("combiner=sum",)),
    ("sal", "prefill_rate"): (queue_or_memory, (), ("prefill_rate=1e6",)),
    ("sal", "release_rate"): (queue_or_memory, (), ("release_rate=100",)),
    ("sal", "mean_output"): (outputs_count, (), ("mean_output=true",)),
    ("sal", "in_flight"): (burst, ("ties=index",), ("ties=index", "in_flight=false")),
    ("sal", "ties"): (nothing_to_do, (), ("ties=index",)),
    ("d2lpm", "worker_quantum"): (hot_client, (), ("worker_quantum=20",)),
    ("d2lpm", "router_charge"): (
        hot_client,
        ("worker_quantum=20",),
        ("worker_quantum=20", "router_charge=extend"),
    ),
    ("d2lpm", "w_in"): (hot_client, ("worker_quantum=40",), ("worker_quantum=40", "w_in=3")),
    ("d2lpm", "w_out"): (hot_client, ("worker_quantum=40",), ("worker_quantum=40", "w_out=9")),
    ("d2lpm", "new_replica_credit"): (newly_joined, (), ("new_replica_credit=quantum",)),
    ("d2lpm", "tree_pages"): (old_prefix, (), ("tree_pages=2",)),
}


def test_every_parameter_has_a_case() -> None:
    parameters = {
        (policy.name, field.name)
        for policy in ROUTINGS.values()
        for field in dataclasses.fields(policy.parameters)
    }
    assert set(CASES) == parameters


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_every_parameter_changes_a_choice(name: str, parameter: str) -> None:
    case, one, other = CASES[name, parameter]
    assert case(desk(name, *one)) != case(desk(name, *other))


def test_mistakes_are_told_by_name() -> None:
    def make(name: str, *options: str) -> Routing:
        return make_routing(name, options, num_replicas=2, page_size=PAGE)

    for name, options, message in [
        ("sall", (), "routing: got 'sall'; allowed: round_robin, .*; did you mean 'sal'"),
        ("sal", ("combiner=min",), "routing_options: combiner: got 'min'; allowed: max, sum"),
        ("d2lpm", ("worker_quantum=0",), "worker_quantum: got 0.0; allowed: a positive number"),
        ("d2lpm", ("w_in=-1",), "w_in: got -1.0; allowed: 0 or more, 1e9 at most"),
        ("cache_aware", ("threshold=2",), "threshold: got 2.0; allowed: 0 to 1"),
        ("cache_aware", ("tree_pages=0",), "tree_pages: got 0; allowed: 1 or more"),
        ("conversation_affinity", ("points=0",), "points: got 0; allowed: 1 to 4096"),
        ("least_load", ("throughput=0",), "throughput: got 0.0; allowed: a positive number"),
        ("least_load", ("request_tokens=0",), "request_tokens: got 0; allowed: 1 or more"),
        ("sal", ("prefill_rate=nan",), "prefill_rate: got nan; allowed: a positive number"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(name, *options)


def test_a_trace_that_lacks_what_a_policy_needs_is_refused() -> None:
    require_told("d2lpm", ("clients", "prefixes"), by="trace x.csv")
    require_told("sal", (), by="trace x.csv")
    message = (
        "routing: got 'd2lpm'; allowed: round_robin, .*, sal; d2lpm needs prefixes,"
        " and trace x.csv has none"
    )
    with pytest.raises(ValueError, match=message):
        require_told("d2lpm", ("clients",), by="trace x.csv")
