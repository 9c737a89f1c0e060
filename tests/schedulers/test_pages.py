"""The page pool and its prefix tree under random use, with a device that remembers every token."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.schedulers.pages import Forked, Granted, Lease, OutOfPages, PagePool
from jaxserve.schedulers.prefix_tree import Cleared, Gap, Removed, Resumed, Stored, page_keys

PAGE = 4  # tokens
OVERRUN = -1  # what a slice writes behind the tokens that were accepted


def keys_of(tokens: Sequence[int]) -> list[bytes]:
    return page_keys(np.array(tokens, np.int32), page_size=PAGE, scope="all", model="m")


def granted(outcome: Granted | OutOfPages) -> Lease:
    assert isinstance(outcome, Granted), outcome
    return outcome.lease


def lease_for(pool: PagePool, tokens: Sequence[int]) -> Lease:
    keys = keys_of(tokens)[: (len(tokens) - 1) // PAGE]
    return granted(pool.lease(len(tokens), pool.tree.match(keys)))


def cache(pool: PagePool, tokens: Sequence[int]) -> None:
    lease = lease_for(pool, tokens)
    pool.insert(lease, keys_of(tokens))
    pool.release(lease)


# What each call promises


def test_a_lease_covers_its_tokens_and_grows_all_or_nothing():
    pool = PagePool(4, PAGE)
    lease = granted(pool.lease(5))
    assert lease.pages == [0, 1]
    assert pool.extend(lease, 8) == Granted(lease, ())
    assert pool.extend(lease, 9) == Granted(lease, (2,))
    assert pool.extend(lease, 17) == OutOfPages(wanted=2, available=1, retiring=0)
    assert lease.pages == [0, 1, 2]
    pool.check()


def test_a_released_page_waits_for_the_last_dispatch_that_touches_it():
    pool = PagePool(4, PAGE)
    early, late = granted(pool.lease(8)), granted(pool.lease(8))
    pool.touch(early, 1)
    pool.touch(late, 1)
    pool.touch(late, 2)
    pool.release(late)  # released out of dispatch order
    pool.release(early)
    assert pool.lease(1) == OutOfPages(wanted=1, available=0, retiring=4)
    pool.parsed(1)
    assert pool.lease(9) == OutOfPages(wanted=3, available=2, retiring=2)
    pool.parsed(2)
    assert pool.statistics().free == 4
    pool.check()


def test_parsing_a_dispatch_parses_all_before_it():
    pool = PagePool(4, PAGE)
    for dispatch in (1, 2, 4):
        lease = granted(pool.lease(1))
        pool.touch(lease, dispatch)
        pool.release(lease)
    pool.parsed(3)
    assert (pool.statistics().free, pool.statistics().retiring) == (3, 1)
    pool.check()


def test_inserting_less_than_is_read_only_already_keeps_it_read_only():
    pool = PagePool(4, PAGE)
    lease = granted(pool.lease(12))
    pool.insert(lease, keys_of(range(8)))
    pool.insert(lease, keys_of(range(4)))
    assert lease.num_shared == 2
    pool.check()


def test_a_cached_page_in_flight_is_not_evicted_after_its_reader_was_released():
    pool = PagePool(3, PAGE)
    cache(pool, range(8))
    reader = lease_for(pool, range(9))
    pool.touch(reader, 1)
    pool.release(reader)
    assert isinstance(pool.lease(1), OutOfPages)
    pool.parsed(1)
    assert len(granted(pool.lease(12)).pages) == 3
    assert pool.tree.statistics().evictions == 2


def test_a_fork_shares_whole_pages_and_copies_the_partial_one():
    pool = PagePool(5, PAGE)
    lease = granted(pool.lease(6))
    forked = pool.fork(lease, 3, num_tokens=6, dispatch=1)
    assert isinstance(forked, Forked) and forked.leases[0] is lease
    assert [f.pages for f in forked.leases] == [[0, 1], [0, 2], [0, 3]]
    assert forked.copies == ((1, 2), (1, 3))
    assert all(f.num_shared == 1 for f in forked.leases)
    pool.check()


def the_pages_of_a_copy_wait_for_it(pool: PagePool) -> None:
    forked = pool.fork(granted(pool.lease(6)), 3, num_tokens=6, dispatch=1)
    assert isinstance(forked, Forked)
    for each in forked.leases:
        pool.release(each)
    assert pool.statistics().free == pool.num_pages - 4, "one shared, one source, two targets"
    pool.parsed(1)
    assert pool.statistics().free == pool.num_pages
    pool.check()


def test_the_pages_of_a_copy_wait_for_it_even_if_released_before_it_runs():
    the_pages_of_a_copy_wait_for_it(PagePool(5, PAGE))


def test_a_fork_that_does_not_fit_changes_nothing():
    pool = PagePool(3, PAGE)
    lease = granted(pool.lease(6))
    assert pool.fork(lease, 3, num_tokens=6, dispatch=1) == OutOfPages(2, 1, 0)
    assert lease.num_shared == 0 and lease.last_dispatch == 0
    aligned = pool.fork(lease, 3, num_tokens=4, dispatch=1)
    assert isinstance(aligned, Forked) and aligned.copies == ()


def test_a_duplicate_page_stays_with_its_lease_and_what_follows_it_is_cached():
    pool = PagePool(8, PAGE)
    first, second = granted(pool.lease(8)), granted(pool.lease(8))
    pool.insert(first, keys_of([1, 1, 1, 1, 2, 2, 2, 2]))
    pool.insert(second, keys_of([1, 1, 1, 1, 3, 3, 3, 3]))
    pool.check()
    assert (first.pages, second.pages) == ([0, 1], [2, 3]), "no page table is swapped"
    pool.release(first)
    assert pool.statistics().evictable == 1, "the page under second's child cannot go"
    pool.release(second)
    assert (pool.statistics().cached, pool.statistics().evictable) == (3, 3)
    pool.check()


def test_cost_counts_the_pages_a_match_takes_out_of_reach():
    pool = PagePool(8, PAGE)
    cache(pool, range(8))
    match = pool.tree.match(keys_of(range(8)))
    assert pool.cost(9, match) == 3, "one new page, and two that could be evicted until now"
    before = pool.num_available
    reader = granted(pool.lease(9, match))
    assert pool.num_available == before - 3
    assert pool.cost(9, match) == 1, "read already"
    assert pool.tree.statistics().hit_tokens == 8
    pool.release(reader)


def test_a_stale_match_is_refused():
    pool = PagePool(2, PAGE)
    cache(pool, range(8))
    match = pool.tree.match(keys_of(range(8)))
    pool.release(granted(pool.lease(8)))  # evicts both
    with pytest.raises(AssertionError, match="match again"):
        pool.lease(8, match)


def test_clearing_the_cache_leaves_pages_to_their_readers():
    pool = PagePool(4, PAGE)
    cache(pool, range(8))
    reader = lease_for(pool, range(5))
    pool.clear_cache()
    pool.check()
    assert (pool.statistics().cached, pool.statistics().free) == (0, 2)
    pool.insert(reader, keys_of(range(4)))
    assert pool.statistics().cached == 1, "and they can be cached again"
    pool.release(reader)
    pool.check()


def test_releasing_twice_and_touching_for_the_past_are_refused():
    pool = PagePool(2, PAGE)
    lease = granted(pool.lease(1))
    pool.parsed(3)
    with pytest.raises(AssertionError):
        pool.touch(lease, 3)
    with pytest.raises(AssertionError, match="parsed before"):
        pool.parsed(3)
    pool.release(lease)
    with pytest.raises(AssertionError, match="released before"):
        pool.release(lease)


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="got num_pages=0, page_size=16; try a larger"):
        PagePool(0, 16)


# Everything at once


@dataclass(eq=False)
class Row:
    lease: Lease
    tokens: list[int]
    num_computed: int  # of `tokens`, on the device once all dispatches so far have run
    fork_dispatch: int = 0  # until it is dispatched, the pages are not yet what they should be


class Serving(RuleBasedStateMachine):
    """An engine with its device: pages hold token ids, so a page in wrong hands shows as a token.

    Prompts are few and their first pages fewer, so that prefixes, duplicates and evictions abound.
    """

    pool_class: type[PagePool] = PagePool

    def __init__(self):
        super().__init__()
        self.pool = self.pool_class(14, PAGE, num_events_kept=4)
        self.rows: list[Row] = []
        self.dispatch = 1  # the number of the next one
        self.copies: list[tuple[int, int]] = []  # for the next dispatch
        self.in_flight: deque[tuple[int, set[int]]] = deque()
        self.device = [[0] * PAGE for _ in range(14)]
        self.tokens_under: dict[bytes, list[int]] = {}
        self.mirror: dict[bytes, bytes] = {}  # a subscriber: key -> parent key
        self.seen_seq = 0
        for head in range(3):  # a warm cache: most of the pool is there to be hit or evicted
            row = Row(granted(self.pool.lease(12)), [head] * 12, num_computed=12)
            for page in row.lease.pages:
                self.device[page] = [head] * PAGE
            self.insert_computed(row)
            self.pool.release(row.lease)

    def handed_out(self, pages: Sequence[int]) -> None:
        touched = set().union(*(pages for _, pages in self.in_flight))
        touched |= {page for copy in self.copies for page in copy}
        assert not touched & set(pages), "a page that an unparsed dispatch may touch"

    def refused(self, outcome: OutOfPages, before: object) -> None:
        assert outcome.wanted > outcome.available == self.pool.num_available
        assert self.pool.statistics() == before, "all or nothing"

    @precondition(lambda self: len(self.rows) < 4)
    @rule(head=st.integers(0, 2), tail=st.integers(0, 3), length=st.integers(1, 18))
    def arrive(self, head: int, tail: int, length: int):
        tokens = ([head] * 8 + [tail] * 10)[:length]
        match = self.pool.tree.match(keys_of(tokens)[: (length - 1) // PAGE])
        before, available = self.pool.statistics(), self.pool.num_available
        cost = self.pool.cost(length, match)
        outcome = self.pool.lease(length, match)
        if isinstance(outcome, OutOfPages):
            assert cost > available
            return self.refused(outcome, before)
        assert self.pool.num_available == available - cost
        self.rows.append(Row(outcome.lease, tokens, match.num_pages * PAGE))
        self.handed_out(outcome.pages)

    def pick(self, data: st.DataObject) -> Row:
        return data.draw(st.sampled_from(self.rows))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), more=st.integers(0, 9))
    def extend(self, data: st.DataObject, more: int):
        row, before = self.pick(data), self.pool.statistics()
        outcome = self.pool.extend(row.lease, len(row.tokens) + more)
        if isinstance(outcome, OutOfPages):
            return self.refused(outcome, before)
        self.handed_out(outcome.pages)

    @precondition(lambda self: len(self.rows) < 4 and any(r.num_computed for r in self.rows))
    @rule(data=st.data(), n=st.integers(2, 3))
    def fork(self, data: st.DataObject, n: int):
        row = data.draw(st.sampled_from([row for row in self.rows if row.num_computed]))
        before = self.pool.statistics()
        outcome = self.pool.fork(row.lease, n, num_tokens=row.num_computed, dispatch=self.dispatch)
        if isinstance(outcome, OutOfPages):
            return self.refused(outcome, before)
        for lease in outcome.leases[1:]:
            tokens = row.tokens[: row.num_computed]
            self.rows.append(Row(lease, tokens, row.num_computed, self.dispatch))
        self.handed_out([target for _, target in outcome.copies])
        self.copies += outcome.copies

    @precondition(lambda self: len(self.in_flight) < 3)
    @rule(data=st.data(), grow=st.integers(0, 6), overrun=st.integers(0, 6))
    def run_slice(self, data: st.DataObject, grow: int, overrun: int):
        """Copies first, then rows write the rest of their tokens, new ones, and some overrun."""
        touched = {page for copy in self.copies for page in copy}
        for source, target in self.copies:
            self.device[target] = list(self.device[source])
        for row in self.rows:
            if data.draw(st.integers(0, 3)) == 3:
                continue  # rows may sit a slice out
            self.pool.touch(row.lease, self.dispatch)
            touched |= set(row.lease.pages)
            room = len(row.lease.pages) * PAGE - len(row.tokens)
            row.tokens = row.tokens + [data.draw(st.integers(0, 1))] * min(grow, max(0, room))
            written = [*row.tokens, *[OVERRUN] * min(overrun, max(0, room - grow))]
            for position in range(row.num_computed, len(written)):
                assert position >= row.lease.num_shared * PAGE, "a shared page is written"
                page = row.lease.pages[position // PAGE]
                self.device[page][position % PAGE] = written[position]
            row.num_computed = len(row.tokens)
        self.copies = []
        self.in_flight.append((self.dispatch, touched))
        self.dispatch += 1

    @precondition(lambda self: self.in_flight)
    @rule()
    def parse(self):
        self.pool.parsed(self.in_flight.popleft()[0])
        self.subscribe()

    def insert_computed(self, row: Row) -> None:
        tokens = row.tokens[: row.num_computed]
        keys = keys_of(tokens)
        for index, key in enumerate(keys):
            self.tokens_under[key] = tokens[index * PAGE : (index + 1) * PAGE]
        self.pool.insert(row.lease, keys)

    def is_there(self, row: Row) -> bool:
        return row.fork_dispatch < self.dispatch

    @precondition(lambda self: any(map(self.is_there, self.rows)))
    @rule(data=st.data())
    def insert(self, data: st.DataObject):
        self.insert_computed(data.draw(st.sampled_from([*filter(self.is_there, self.rows)])))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), abort=st.booleans())
    def end(self, data: st.DataObject, abort: bool):
        row = self.pick(data)
        if not abort and self.is_there(row):
            self.insert_computed(row)
        self.pool.release(row.lease)
        self.rows.remove(row)

    @precondition(lambda self: self.pool.tree.num_cached > 11)
    @rule()
    def clear(self):
        self.pool.clear_cache()

    def subscribe(self):
        """The mirror catches up by events, or by a snapshot where events are gone."""
        match self.pool.tree.events_since(self.seen_seq):
            case Gap():
                snapshot = self.pool.tree.snapshot()
                self.mirror = {key: parent for parent, key in snapshot.pages}
                self.seen_seq = snapshot.seq
            case Resumed(events):
                for event in events:
                    self.seen_seq += 1
                    assert event.seq == self.seen_seq
                    follow(self.mirror, event)
        snapshot = self.pool.tree.snapshot()
        assert self.mirror == {key: parent for parent, key in snapshot.pages}

    @invariant()
    def the_laws_hold(self):
        self.pool.check()

    @invariant()
    def the_device_holds_the_right_tokens(self):
        for row in filter(self.is_there, self.rows):
            held = [token for page in row.lease.pages for token in self.device[page]]
            assert held[: row.num_computed] == row.tokens[: row.num_computed]
        for _, key in self.pool.tree.snapshot().pages:
            page = self.pool.tree.match([key]).pages[0]
            assert self.device[page] == self.tokens_under[key]

    def teardown(self):
        for row in self.rows:
            self.pool.release(row.lease)
        self.pool.parsed(self.dispatch)  # and the copies that never ran are given up
        self.pool.check()
        s = self.pool.statistics()
        assert (s.free + s.cached, s.retiring, s.evictable) == (s.total, 0, s.cached)
        self.pool.clear_cache()
        self.pool.check()
        assert self.pool.statistics().free == s.total


def follow(mirror: dict[bytes, bytes], event: Stored | Removed | Cleared) -> None:
    match event:
        case Stored(_, parent, keys):
            for key in keys:
                mirror[key] = parent
                parent = key
        case Removed(_, keys):
            for key in keys:
                assert key not in mirror.values(), "a parent was evicted before its child"
                del mirror[key]
        case Cleared():
            mirror.clear()


Serving.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestServing = Serving.TestCase


# Twins that break one law each


class HandsOnAtOnce(PagePool):
    def touch(self, lease: Lease, dispatch: int) -> None:
        pass


class FreesTwice(PagePool):
    def _settle(self, lease: Lease) -> None:
        super()._settle(lease)
        self._free += lease.pages[lease.num_shared :]


class ForgetsForkReaders(PagePool):
    def fork(self, lease: Lease, n: int, *, num_tokens: int, dispatch: int) -> Forked | OutOfPages:
        outcome = super().fork(lease, n, num_tokens=num_tokens, dispatch=dispatch)
        if isinstance(outcome, Forked):
            for page in lease.pages[: num_tokens // PAGE]:
                self._readers[page] = 1
        return outcome


class LosesCopySource(PagePool):
    def fork(self, lease: Lease, n: int, *, num_tokens: int, dispatch: int) -> Forked | OutOfPages:
        touched_before = lease.last_dispatch
        outcome = super().fork(lease, n, num_tokens=num_tokens, dispatch=dispatch)
        lease.last_dispatch = touched_before
        return outcome


class DropsPinsAtOnce(PagePool):
    """Retires a lease's own pages by the rule, but stops reading the shared ones at release."""

    def release(self, lease: Lease) -> None:
        run = Lease(lease.pages[: lease.num_shared], lease.num_shared)
        lease.pages, lease.num_shared = lease.pages[lease.num_shared :], 0
        super().release(lease)
        self._settle(run)


def test_a_fork_that_does_not_hold_its_source_is_caught():
    with pytest.raises(AssertionError, match="one source"):
        the_pages_of_a_copy_wait_for_it(LosesCopySource(5, PAGE))


@pytest.mark.parametrize("twin", [HandsOnAtOnce, FreesTwice, ForgetsForkReaders, DropsPinsAtOnce])
def test_a_broken_twin_is_caught(twin: type[PagePool]):
    class Broken(Serving):
        pool_class = twin

    search = settings(
        max_examples=1000,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Broken, settings=search)
