"""The router: what it counts, whom it asks, and what becomes of requests whose replica is gone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import NotReady
from jaxserve.fleet.router import NoReplica, Router
from jaxserve.schedulers.prefix_tree import NO_PARENT, Cleared, Stored
from jaxserve.schedulers.routing import LoadReport, Routable
from jaxserve.schedulers.routing.catalog import ROUTINGS, make_routing

PAGE = 4
KEYS = (b"1", b"2", b"3")


def make_router(name: str = "round_robin", *options: str, num_replicas: int = 3) -> Router:
    routing = make_routing(name, options, num_replicas=num_replicas, page_size=PAGE)
    return Router(routing, num_replicas=num_replicas)


def request(number: int, client: str = "a", keys: tuple[bytes, ...] = KEYS) -> Routable:
    return Routable(number=number, client=client, num_prompt_tokens=13, page_keys=keys)


def load_report(at_s: float, num_received: int, waiting_tokens: int) -> LoadReport:
    return LoadReport(
        at_s=at_s,
        num_received=num_received,
        num_waiting=1,
        num_running=0,
        waiting_tokens=waiting_tokens,
        waiting_prompt_tokens=waiting_tokens,
        kv_free_tokens=1000,
        kv_total_tokens=1000,
    )


def test_what_is_sent_counts_until_it_ends() -> None:
    router = make_router()
    assert [router.route(request(number), 0.0) for number in range(4)] == [0, 1, 2, 0]
    assert [router.dispatched(replica) for replica in range(3)] == [2, 1, 1]
    router.ended(0, 5)
    router.ended(0, 5)  # twice, or of a request that was lost: nobody's
    assert list(router.views.outstanding) == [1, 1, 1]


def test_with_nobody_to_send_to_it_says_so_and_changes_nothing() -> None:
    router = make_router(num_replicas=2)
    router.set_healthy(0, False)
    assert router.lost(1) == []
    with pytest.raises(NoReplica, match="no replica of 2 is healthy") as error:
        router.route(request(0), 0.0)
    assert isinstance(error.value, NotReady) and not router.views.outstanding.any()
    router.set_healthy(0, True)
    assert router.route(request(0), 1.0) == 0


def test_a_lost_replica_gives_back_its_requests_and_hears_nothing_until_it_joins() -> None:
    router = make_router("cache_aware")
    assert {router.route(request(number), 0.0) for number in range(4)} == {0}
    assert router.lost(0) == [0, 1, 2, 3] and router.lost(0) == []
    router.report(0, load_report(1.0, 4, 10), 1.0)
    router.cache_changed(0, Stored(1, NO_PARENT, KEYS), 4)
    router.set_healthy(0, True)
    assert not router.views.reported[0] and not router.views.outstanding.any()
    assert router.route(request(0), 2.0) == 1  # under its old number, elsewhere
    router.joined(0)
    assert router.dispatched(0) == 0 and router.route(request(9, keys=()), 3.0) == 0
    with pytest.raises(ValueError, match="replica: got 1; allowed: 3"):
        router.joined(1)
    router.joined(3)
    assert len(router.views) == 4


def test_a_prefix_is_found_where_it_went_and_lost_where_it_was_evicted() -> None:
    router = make_router("cache_aware")
    assert router.route(request(0), 0.0) == 0
    assert router.route(request(1), 0.0) == 0
    assert router.views.in_flight_tokens[0] == 13 + 1  # the second finds all but its last token
    router.cache_changed(0, Cleared(1), 1)  # it had not received the second: ignored
    assert router.route(request(2), 0.0) == 0
    router.cache_changed(0, Cleared(1), 3)
    assert router.route(request(3), 0.0) == 1


def test_reports_take_what_they_have_seen_out_of_flight() -> None:
    router = make_router("least_tokens", num_replicas=2)
    for number in range(4):
        router.route(request(number), 0.0)
    router.report(0, load_report(1.0, 1, 5), 1.0)
    assert list(router.views.in_flight_tokens) == [13, 26] and router.views.now_s == 1.0
    assert router.route(request(4), 2.0) == 0


@pytest.mark.parametrize("name", ROUTINGS)
@given(seed=st.integers(0, 10**6))
def test_every_request_is_somewhere_until_it_ends(name: str, seed: int) -> None:
    """Whatever fails, whenever: counts agree, and nothing stays."""
    rng = random.Random(seed)
    router, gone, live, number = make_router(name), set(), set(), 0
    for now_s in range(60):
        move = rng.random()
        if move < 0.5 and len(gone) < 3:
            number += 1
            replica = router.route(request(number, rng.choice("ab")), float(now_s))
            assert replica not in gone
            live.add(number)
        elif move < 0.7 and live:
            router.ended(live.pop(), rng.randint(0, 5))
        elif move < 0.75 and len(gone) < 3:
            replica = rng.choice(sorted({0, 1, 2} - gone))
            gone.add(replica)
            live -= set(router.lost(replica))
        elif move < 0.85 and gone:
            router.joined(gone.pop())
        else:
            router.report(rng.randrange(3), load_report(now_s / 2, rng.randint(0, 9), 7), now_s / 2)
        assert len(live) == router.views.outstanding.sum()
    for number in live:
        router.ended(number, 1)
    assert not router.views.outstanding.any()


def test_a_fleet_has_a_replica() -> None:
    with pytest.raises(ValueError, match="num_replicas: got 0; allowed: 1 or more"):
        Router(make_routing("random", num_replicas=0, page_size=1), num_replicas=0)
