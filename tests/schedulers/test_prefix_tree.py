"""Keys, the order of eviction, and the events that let a subscriber mirror the tree."""

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.schedulers.pages import Granted, Lease, PagePool
from jaxserve.schedulers.prefix_tree import (
    KEY_BYTES,
    NO_PARENT,
    Cleared,
    Gap,
    PrefixTree,
    Removed,
    Resumed,
    Snapshot,
    Stored,
    page_keys,
    prefix_scope,
)

PAGE = 4
GOLDEN_KEYS = ["845c8705aa65c398f934d04630321464", "3ba37c5f18db268de0ffa1432b2e4cf8"]


def keys_of(tokens: Sequence[int], scope: str = "all", model: str = "m") -> list[bytes]:
    return page_keys(np.array(tokens, np.int32), page_size=PAGE, scope=scope, model=model)


def leased(pool: PagePool, num_tokens: int, keys: list[bytes] | None = None) -> Lease:
    granted = pool.lease(num_tokens, None if keys is None else pool.tree.match(keys))
    assert isinstance(granted, Granted)
    return granted.lease


def cache(pool: PagePool, tokens: Sequence[int]) -> list[bytes]:
    """As a request with these tokens would: look, compute, insert, release."""
    keys = keys_of(tokens)
    lease = leased(pool, len(tokens), keys)
    pool.insert(lease, keys)
    pool.release(lease)
    return keys


def num_matched(pool: PagePool, tokens: Sequence[int]) -> int:
    return pool.tree.match(keys_of(tokens)).num_pages


# Keys


def test_a_key_is_the_same_in_every_process_and_release():
    code = (
        "import numpy as np; from jaxserve.schedulers.prefix_tree import page_keys;"
        "k = page_keys(np.arange(9, dtype=np.int32), page_size=4, scope='client:a', model='demo');"
        "print(*[key.hex() for key in k])"
    )
    other = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert other == GOLDEN_KEYS


def test_only_whole_pages_have_keys():
    assert keys_of([]) == keys_of([1, 2, 3]) == []
    assert len(keys_of(range(9))) == 2
    assert {len(key) for key in keys_of(range(9))} == {KEY_BYTES}


def test_a_key_depends_on_all_before_it_and_on_nothing_after():
    assert keys_of([1, 1, 1, 1, 2, 2, 2, 2])[1] != keys_of([3, 1, 1, 1, 2, 2, 2, 2])[1]
    assert keys_of(range(12))[:2] == keys_of(range(8))


def test_scope_and_model_separate_keys():
    chains = [("ab", "c"), ("a", "bc"), ("ab", "d"), ("b", "c")]
    assert len({keys_of(range(4), *chain)[0] for chain in chains}) == len(chains)


def test_a_chain_goes_on_from_its_parent():
    whole = keys_of(range(12))
    more = np.arange(4, 12, dtype=np.int32)
    assert page_keys(more, page_size=PAGE, scope="all", model="m", parent=whole[0]) == whole[1:]


@pytest.mark.parametrize("tokens", [np.zeros(4, np.int64), np.zeros((2, 4), np.int32)])
def test_tokens_that_are_not_a_vector_of_int32_are_refused(tokens: np.ndarray):
    with pytest.raises(TypeError, match="must be a vector of int32, got .*; try np.asarray"):
        page_keys(tokens, page_size=PAGE, scope="all", model="m")


def test_the_scope_says_who_shares():
    assert prefix_scope("all", client="ann", group="") == "all"
    assert prefix_scope("client", client="x", group="y") == "client:x"
    assert prefix_scope("group", client="y", group="x") == "group:x"
    with pytest.raises(ValueError, match="one of client, group, all, got 'tenant'"):
        prefix_scope("tenant", client="x", group="y")
    with pytest.raises(ValueError, match="needs a group name, got ''; name the caller or set"):
        prefix_scope("group", client="x", group="")


# Matching and eviction


def test_the_longest_cached_prefix_is_matched():
    pool = PagePool(8, PAGE)
    cache(pool, range(12))
    assert num_matched(pool, [*range(8), 0, 0, 0, 0]) == 2
    assert num_matched(pool, range(40)) == 3
    assert num_matched(pool, [9, 9, 9, 9]) == 0
    assert pool.tree.match(keys_of(range(40))).pages == (0, 1, 2)


def test_the_least_recently_released_leaf_goes_first():
    pool = PagePool(4, PAGE)
    a, b = [1] * 8, [2] * 8
    cache(pool, a)
    cache(pool, b)
    cache(pool, a)  # used again
    pool.release(leased(pool, PAGE))
    assert (num_matched(pool, a), num_matched(pool, b)) == (2, 1), "b's leaf, and no more"
    lease = leased(pool, 3 * PAGE)
    assert (num_matched(pool, a), num_matched(pool, b)) == (1, 0)
    pool.release(lease)


def test_looking_does_not_make_recent():
    pool = PagePool(2, PAGE)
    cache(pool, [1] * 4)
    cache(pool, [2] * 4)
    num_matched(pool, [1] * 4)
    pool.release(leased(pool, PAGE))
    assert (num_matched(pool, [1] * 4), num_matched(pool, [2] * 4)) == (0, 1)


def test_a_running_path_is_pinned():
    pool = PagePool(4, PAGE)
    keys = cache(pool, [1] * 8)
    reader = leased(pool, 8, keys)
    s = pool.tree.statistics()
    assert (s.cached, s.pinned, s.evictable) == (2, 2, 0)
    cache(pool, [2] * 8)
    cache(pool, [3] * 8)  # evicts all it can
    assert num_matched(pool, [1] * 8) == 2
    pool.release(reader)
    assert pool.tree.statistics().pinned == 0


def test_statistics_count_admitted_requests_only():
    pool = PagePool(8, PAGE)
    keys = cache(pool, range(8))
    for _ in range(10):
        pool.tree.match(keys)  # a request that waits
    pool.release(leased(pool, 12, keys_of(range(12))))
    pool.release(leased(pool, 12))  # bypasses the cache
    s = pool.tree.statistics()
    assert (s.lookups, s.query_tokens, s.hit_tokens, s.evictions) == (2, 8 + 12, 8, 0)


# Events


def test_events_tell_what_changed_in_order():
    pool = PagePool(4, PAGE)
    long = cache(pool, [1] * 8)
    branch = cache(pool, [1] * 4 + [2] * 4)
    pool.release(leased(pool, 8))
    pool.clear_cache()
    assert pool.tree.events_since(0) == Resumed(
        (
            Stored(1, NO_PARENT, tuple(long)),
            Stored(2, long[0], (branch[1],)),
            Removed(3, (long[1],)),
            Cleared(4),
        )
    )
    assert pool.tree.events_since(3) == Resumed((Cleared(4),))
    assert pool.tree.events_since(4) == Resumed(())


def test_a_subscriber_that_fell_behind_or_comes_from_elsewhere_is_told_so():
    pool = PagePool(8, PAGE, num_events_kept=2)
    chains = [cache(pool, [token] * 4) for token in range(4)]
    assert pool.tree.events_since(1) == Gap(first=3, last=4)
    assert pool.tree.events_since(5) == Gap(first=3, last=4), "a number we never gave"
    assert isinstance(pool.tree.events_since(2), Resumed)
    assert pool.tree.snapshot() == Snapshot(4, tuple((NO_PARENT, keys[0]) for keys in chains))


# Against a slow model: the cache is a set of token tuples, recency is a list of releases


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=4),  # one token value a page
        min_size=1,
        max_size=25,
    )
)
def test_eviction_is_lru_over_leaves(prompts: list[list[int]]):
    num_pages = 6
    pool = PagePool(num_pages, PAGE)
    cached: list[tuple[int, ...]] = []  # oldest first; children before parents
    for prompt in prompts:
        path = [tuple(prompt[: n + 1]) for n in range(len(prompt))]
        hits = [prefix for prefix in path if prefix in cached]
        cached = [prefix for prefix in cached if prefix not in hits]
        while len(cached) + len(path) > num_pages:
            leaf = next(c for c in cached if not any(o[:-1] == c for o in cached))
            assert leaf == cached[0], "the oldest is always a leaf"
            cached.remove(leaf)
        cached += reversed(path)
        cache(pool, [token for token in prompt for _ in range(PAGE)])
        pool.check()
        found = {key for _, key in pool.tree.snapshot().pages}
        assert found == {keys_of([t for t in prefix for _ in range(PAGE)])[-1] for prefix in cached}


def test_the_same_calls_give_the_same_tree():
    def run() -> tuple[Snapshot, Resumed | Gap]:
        pool, draw = PagePool(9, PAGE), np.random.default_rng(0)
        for _ in range(200):
            cache(pool, np.repeat(draw.integers(0, 2, draw.integers(1, 6)), PAGE).tolist())
        return pool.tree.snapshot(), pool.tree.events_since(pool.tree.statistics().last_seq - 99)

    assert run() == run()


# Twins


class EvictsNewest(PrefixTree):
    def evict(self, num_pages: int) -> list[int]:
        self._idle = OrderedDict(reversed(self._idle.items()))
        return super().evict(num_pages)


class ForgetsPins(PrefixTree):
    def hold(self, pages: Sequence[int]) -> None:
        pass


@pytest.mark.parametrize("twin, num_matched", [(EvictsNewest, 0), (ForgetsPins, 1)])
def test_a_broken_twin_is_caught(twin: type[PrefixTree], num_matched: int):
    pool = PagePool(2, PAGE)
    pool.tree = twin(PAGE)
    keys = cache(pool, [1] * 8)
    leased(pool, PAGE, keys[:num_matched])
    with pytest.raises(AssertionError):
        pool.check()
