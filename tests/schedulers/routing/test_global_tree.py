"""The global prefix tree: who holds what, under events that are late, lost or from another time."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.prefix_tree import NO_PARENT, Cleared, Removed, Stored
from jaxserve.schedulers.routing.catalog import make_routing
from jaxserve.schedulers.routing.global_tree import GlobalTree
from jaxserve.schedulers.routing.laws import PAGE, ToyFleet, traffic

P = (b"p1", b"p2", b"p3")


def chain(rng: random.Random, depth: int = 5) -> tuple[bytes, ...]:
    pages = [rng.choice("ab") for _ in range(rng.randint(1, depth))]
    return tuple("/".join(pages[: place + 1]).encode() for place in range(len(pages)))


def test_what_is_on_its_way_is_not_removed_by_older_events() -> None:
    """papers.md 3.5."""
    tree = GlobalTree(2, max_pages=10)
    tree.sent(1, P, 7)
    tree.changed(1, Removed(1, P[::-1]), 6)
    assert list(tree.matched(P)) == [0, 3]
    tree.changed(1, Cleared(2), 6)
    assert list(tree.matched(P)) == [0, 3]
    tree.changed(1, Removed(3, P[:0:-1]), 7)
    assert list(tree.matched(P)) == [0, 1]
    tree.changed(1, Cleared(4), 7)
    assert list(tree.matched(P)) == [0, 0] and len(tree) == 0


def test_a_page_that_is_stored_is_removed_by_a_later_event_alone() -> None:
    tree = GlobalTree(1, max_pages=10)
    tree.changed(0, Stored(1, NO_PARENT, P), 4)
    tree.changed(0, Removed(0, P[::-1]), 3)  # overtaken on its way
    assert list(tree.matched(P)) == [3]
    tree.changed(0, Removed(2, P[:1:-1]), 4)
    assert list(tree.matched(P)) == [2]


def test_a_hole_hides_what_is_behind_it_until_it_is_filled() -> None:
    tree = GlobalTree(1, max_pages=10)
    tree.changed(0, Stored(2, P[0], P[1:]), 0)  # the event of the first page was lost
    assert list(tree.matched(P)) == [0]
    tree.changed(0, Stored(1, NO_PARENT, P[:1]), 0)
    assert list(tree.matched(P)) == [3]
    tree.check()


@given(num_replicas=st.sampled_from([1, 3, 9, 70]), seed=st.integers(0, 10**6))
def test_matches_are_those_of_sets(num_replicas: int, seed: int) -> None:
    rng = random.Random(seed)
    tree = GlobalTree(num_replicas, max_pages=10**6)
    held: list[set[bytes]] = [set() for _ in range(num_replicas)]
    for number in range(1, 40):
        replica, keys = rng.randrange(num_replicas), chain(rng)
        if rng.random() < 0.7:
            for other in rng.sample(range(num_replicas), rng.randint(1, num_replicas)):
                tree.sent(other, keys, number)
                held[other].update(keys)
        elif rng.random() < 0.9:
            tree.changed(replica, Removed(0, keys[::-1]), number)
            held[replica].difference_update(keys)
        else:
            tree.lost(replica)
            held[replica].clear()
        tree.check()
        keys = chain(rng)
        for other, num in enumerate(tree.matched(keys)):
            first = next((n for n, key in enumerate(keys) if key not in held[other]), len(keys))
            assert num == first
        assert list(tree.num_pages) == [len(pages) for pages in held]


@given(seed=st.integers(0, 10**6), most=st.integers(1, 20))
def test_the_least_recently_used_leaf_goes_first(seed: int, most: int) -> None:
    rng = random.Random(seed)
    tree = GlobalTree(3, max_pages=most)
    for number in range(1, 60):
        keys = chain(rng, 8)
        if rng.random() < 0.7:
            tree.sent(rng.randrange(3), keys, number)
        else:
            split = rng.randrange(len(keys))
            parent = keys[split - 1] if split else NO_PARENT
            replica = rng.randrange(3)
            if not split or tree.matched(keys[:split])[replica] == split:
                tree.changed(replica, Stored(0, parent, keys[split:]), number)
        tree.check()
        known = {key for replica in range(3) for key in tree.held(replica)}
        assert all(key.rpartition(b"/")[0] in known for key in known if b"/" in key)
        if len(keys) <= most and rng.random() < 0.5:
            tree.sent(0, keys, number + 60)
            assert tree.matched(keys)[0] == len(keys), "what was used last has gone"


def fleet_with_tree(seed: int) -> tuple[ToyFleet, GlobalTree]:
    routing = make_routing("d2lpm", num_replicas=4, page_size=PAGE)
    return ToyFleet(routing, random.Random(seed)), routing.tree  # type: ignore[attr-defined]


@given(seed=st.integers(0, 10**6))
def test_tree_and_caches_agree_when_all_is_quiet(seed: int) -> None:
    """Whatever was late; replicas come and go."""
    fleet, tree = fleet_with_tree(seed)
    for _ in traffic(fleet, changes=True):
        tree.check()
    fleet.settle()
    for replica in range(4):
        assert set(tree.held(replica)) == fleet.cached(replica)


EVENTS = st.sampled_from(
    [
        Cleared(0),
        *[Removed(0, keys) for keys in (P, P[::-1], P[1:], P[:1], (b"x", b"x"), (b"none", b"y"))],
        *[Stored(0, parent, (b"x", b"y")) for parent in (NO_PARENT, *P, b"none")],
    ]
)


@given(seed=st.integers(0, 10**6), noise=st.lists(EVENTS, max_size=30))
def test_no_event_breaks_the_tree(seed: int, noise) -> None:
    """Lost ones, doubled ones, and ones that make no sense."""
    rng = random.Random(seed)
    tree = GlobalTree(2, max_pages=4)
    for number, event in enumerate(noise, start=1):
        if rng.random() < 0.5:
            tree.sent(rng.randrange(2), P[: rng.randint(0, 3)], number)
        for _ in range(rng.randint(0, 2)):
            tree.changed(rng.randrange(2), event, rng.randint(0, 40))
        tree.check()


def test_a_thousand_replicas() -> None:
    tree = GlobalTree(1000, max_pages=10**4)
    keys = [str(number).encode() for number in range(64)]
    for replica in range(1000):
        tree.sent(replica, keys[: replica % 65], replica + 1)
    assert np.array_equal(tree.matched(keys), np.arange(1000) % 65)
    tree.joined(1000)
    assert tree.matched(keys)[1000] == 0 and len(tree.num_pages) == 1001
