"""Who may use a page of the KV pool, and when it may change hands.

The pool knows pages, leases and dispatch numbers. It knows no request, row or device: the engine
core decides who gets a lease, and `prefix_tree.py` which tokens a cached page holds.

The law. A page has one owner: the free list, the prefix tree, or the leases that hold it, so
`free + leased + cached == total`. The first `num_shared` pages of a lease are its *read-only run*:
full pages that nobody writes again, which other leases may read too. Each lease counts once on
each page of its run (`_readers`). The pages behind the run belong to that lease alone.

When a page changes hands. A released lease keeps every claim it has, on its own pages and on the
run, until the last dispatch that touches it was parsed; then it is *settled*. So for any page that
an unparsed dispatch may read or write there is an unsettled lease that holds it. The free list
holds no such page, because settling is the only way in from a lease. The tree may evict only pages
without readers, so it gives up no such page either; clearing it leaves pages with readers to the
leases that read them. Pins and retirement are this one rule, and the argument does not need the
device to run dispatches in order. To reference-count free pages per dispatch was the other way: it
costs work per page and slice, this costs one number per lease and slice.

Why runs are counted page by page and not by pinning a path of the tree: a run may hold pages that
the tree does not own. A page whose key was cached by someone else first stays where it is, since a
running row's page table is never swapped; a fork shares pages nobody has inserted; `clear_cache`
takes pages out of the tree while they are read. To the counts these are all the same.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from .prefix_tree import KvEvent, Match, PrefixTree

_EVICTION_SHARE: Final = 1 / 256
"""Small enough that what it costs in hits cannot be measured; below 256 pages it is nothing."""


@dataclass(slots=True, eq=False)
class Lease:
    """The pages of one row, in order; `pages` is its page-table row. The pool alone changes it.

    `pages[:num_shared]` are read-only: write no token before `num_shared * page_size`.
    """

    pages: list[int]
    num_shared: int = 0
    last_dispatch: int = 0
    released: bool = field(default=False, repr=False)


@dataclass(slots=True)
class Granted:
    """The lease covers the tokens asked for; `pages` are the ones newly handed out."""

    lease: Lease
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forked:
    """`leases[0]` is the lease that was forked. `copies` are (from page, to page)."""

    leases: tuple[Lease, ...]
    copies: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class OutOfPages:
    """Nothing was done: `wanted` pages, and only `available` free or evictable.

    `retiring` more come back by themselves when the slices in flight are parsed.
    """

    wanted: int
    available: int
    retiring: int


@dataclass(slots=True)
class PoolStatistics:
    """Pages by owner: `free + leased + cached == total`. Nobody changes them; not frozen, which
    takes three times as long.

    `retiring` are those of `leased` that a released lease has to itself and that wait for a parse.
    `evictable` are those of `cached` that nobody reads: `free + evictable` is what can be had now.
    """

    total: int
    free: int
    leased: int
    cached: int
    retiring: int
    evictable: int


class PagePool:
    """Leases of `num_pages` pages, numbered from 0, of `page_size` tokens; one thread owns it.

    Dispatch numbers start at 1, grow, and are parsed in order. A dispatch that is given up, so that
    it never runs, counts as parsed. Methods cost O(pages that change hands or lose a claim); only
    `check` and `clear_cache` look at the whole pool.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_events_kept: int = 4096,
        on_cache_change: Callable[[KvEvent], None] = lambda event: None,
    ):
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"a pool needs at least one page of at least one token, got num_pages={num_pages}, "
                f"page_size={page_size}; try a larger --kv_memory_fraction or page_size=16"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.tree = PrefixTree(
            page_size, num_events_kept=num_events_kept, on_change=on_cache_change
        )
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: what was used last is warm
        self._readers = [0] * num_pages
        self._leases: set[Lease] = set()  # not released
        self._retiring: dict[int, list[Lease]] = {}  # released, by the dispatch they wait for
        self._num_retiring = 0
        self._parsed = 0

    # What can be had.

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now: free, or cached and read by nobody."""
        return len(self._free) + self.tree.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def cost(self, num_tokens: int, match: Match | None = None) -> int:
        """How far `lease(num_tokens, match)` would lower `num_available`.

        A matched page that nobody reads yet costs one as well: it can no longer be evicted.
        """
        return self.cost_of_all((num_tokens,), match)

    def cost_of_all(self, num_tokens: Sequence[int], match: Match | None = None) -> int:
        """As `cost`, of one lease for each of `num_tokens`: they share the matched pages."""
        if match is None:
            return sum([self.pages_for(each) for each in num_tokens])
        found = len(match.pages)
        new = sum([max(0, self.pages_for(each) - found) for each in num_tokens])
        return new + self.tree.num_idle(match)

    # The life of a lease.

    def lease(self, num_tokens: int, match: Match | None = None) -> Granted | OutOfPages:
        """A lease that covers `num_tokens` tokens and begins with the pages of `match`.

        All or nothing. `match` must be fresh (no call that hands out pages since); None bypasses
        the prefix cache and its statistics.
        """
        shared = match.pages if match is not None else ()
        num_new = max(0, self.pages_for(num_tokens) - len(shared))
        wanted = num_new if match is None else num_new + self.tree.num_idle(match)
        if wanted > self.num_available:
            return self._out_of_pages(wanted)
        if match is not None:
            self.tree.admit(match)
            readers = self._readers
            self.tree.hold([page for page in shared if not readers[page]])  # or taking evicts them
            for page in shared:
                readers[page] += 1
        new = self._take(num_new)
        lease = Lease([*shared, *new], num_shared=len(shared))
        self._leases.add(lease)
        return Granted(lease, tuple(new))

    def extend(self, lease: Lease, num_tokens: int) -> Granted | OutOfPages:
        """Grow `lease` to cover `num_tokens` tokens in total. All or nothing; never shrinks."""
        assert not lease.released, "a released lease cannot grow"
        num_new = self.pages_for(num_tokens) - len(lease.pages)
        if num_new <= 0:
            return Granted(lease, ())
        if num_new > self.num_available:
            return self._out_of_pages(num_new)
        new = self._take(num_new)
        lease.pages += new
        return Granted(lease, tuple(new))

    def fork(self, lease: Lease, n: int, *, num_tokens: int, dispatch: int) -> Forked | OutOfPages:
        """`n` leases, `lease` among them, that agree on the first `num_tokens` tokens.

        Whole pages are shared and become read-only, a last partial page is copied for each new
        lease. `dispatch` is the number of the dispatch that makes the copies before anything else;
        all `n` leases count as touched by it, so that no page of a copy is handed on before it was
        parsed, whoever is released meanwhile. All or nothing. New leases cover no more than
        `num_tokens`, rounded up to a page; `lease` keeps what it has.
        """
        assert n >= 1 and not lease.released, (n, lease)
        assert 0 <= num_tokens <= len(lease.pages) * self.page_size, (num_tokens, lease)
        num_whole, partial = divmod(num_tokens, self.page_size)
        wanted = n - 1 if partial else 0
        if wanted > self.num_available:
            return self._out_of_pages(wanted)
        self._make_read_only(lease, num_whole)
        whole = lease.pages[:num_whole]
        for page in whole:
            self._readers[page] += n - 1
        new = self._take(wanted)
        forks = [Lease([*whole, *new[i : i + 1]], num_shared=num_whole) for i in range(n - 1)]
        self._leases.update(forks)
        leases = (lease, *forks)
        if new:
            for each in leases:
                self.touch(each, dispatch)
        return Forked(leases, tuple([(lease.pages[num_whole], page) for page in new]))

    def insert(self, lease: Lease, keys: Sequence[bytes]) -> None:
        """The first `len(keys)` pages of `lease` are computed and final: let others find them.

        The pages go from the lease to the prefix tree, and the lease goes on as their reader. Where
        a key is cached already, the lease keeps its own page until it is settled. Call it before
        `release`, with keys of tokens that were accepted: overrun never gets here.
        """
        assert not lease.released and len(keys) <= len(lease.pages), (len(keys), lease)
        num_known = min(lease.num_shared, len(keys))
        self._make_read_only(lease, len(keys))
        self.tree.adopt(keys, lease.pages, num_known=num_known)

    def touch(self, lease: Lease, dispatch: int) -> None:
        """Slice number `dispatch` may read or write the pages of `lease`."""
        assert not lease.released and dispatch > self._parsed, (dispatch, self._parsed, lease)
        if dispatch > lease.last_dispatch:
            lease.last_dispatch = dispatch

    def release(self, lease: Lease) -> None:
        """Give the lease up: at once, or when the last dispatch that touches it is parsed."""
        assert lease in self._leases, f"{lease} is not a lease of this pool, or was released before"
        self._leases.remove(lease)
        lease.released = True
        if lease.last_dispatch <= self._parsed:
            self._settle(lease)
        else:
            self._retiring.setdefault(lease.last_dispatch, []).append(lease)
            self._num_retiring += len(lease.pages) - lease.num_shared

    def parsed(self, dispatch: int) -> None:
        """The results of all dispatches up to `dispatch` are on the host."""
        assert dispatch > self._parsed, f"dispatch {dispatch} was parsed before"
        self._parsed = dispatch
        if not self._retiring:
            return
        for number in sorted(n for n in self._retiring if n <= dispatch):
            for lease in self._retiring.pop(number):
                self._num_retiring -= len(lease.pages) - lease.num_shared
                self._settle(lease)

    def clear_cache(self) -> None:
        """Forget every cached page. Those that leases read stay with these leases until settled."""
        self._free += [page for page in self.tree.clear() if not self._readers[page]]

    def _make_read_only(self, lease: Lease, num_pages: int) -> None:
        for page in lease.pages[lease.num_shared : num_pages]:
            self._readers[page] = 1
        lease.num_shared = max(lease.num_shared, num_pages)

    def _settle(self, lease: Lease) -> None:
        readers = self._readers
        unread = []
        for page in lease.pages[: lease.num_shared]:
            readers[page] -= 1
            if not readers[page]:
                unread.append(page)
        self._free += self.tree.drop(unread)
        self._free += lease.pages[lease.num_shared :]

    def _take(self, num_pages: int) -> list[int]:
        """`num_pages` pages, evicting if need be; the caller knows that they are there.

        A pool under pressure evicts at every lease. So that many leases pay for one eviction, it
        makes room for `_EVICTION_SHARE` of the pool at least.
        """
        free = self._free
        if num_pages > len(free):
            wanted = max(num_pages - len(free), int(self.num_pages * _EVICTION_SHARE))
            free += self.tree.evict(min(wanted, self.tree.num_evictable))
        split = len(free) - num_pages
        pages = free[split:]
        del free[split:]
        pages.reverse()
        return pages

    def _out_of_pages(self, wanted: int) -> OutOfPages:
        return OutOfPages(wanted, self.num_available, self._num_retiring)

    # Seeing that the law holds.

    def statistics(self) -> PoolStatistics:
        free, cached = len(self._free), self.tree.num_cached
        return PoolStatistics(
            total=self.num_pages,
            free=free,
            leased=self.num_pages - free - cached,
            cached=cached,
            retiring=self._num_retiring,
            evictable=self.tree.num_evictable,
        )

    def check(self) -> None:
        """Recount every law of the pool and of its tree; O(pages). Raises AssertionError."""
        retiring = [lease for leases in self._retiring.values() for lease in leases]
        leases = [*self._leases, *retiring]
        own = [page for lease in leases for page in lease.pages[lease.num_shared :]]
        readers = Counter(page for lease in leases for page in lease.pages[: lease.num_shared])
        cached = [page for page in range(self.num_pages) if page in self.tree]
        loose = [page for page in readers if page not in self.tree]  # read-only, but not cached
        # Sorted together, the owners' pages are every page once: none lost, none owned twice.
        assert sorted([*self._free, *own, *loose, *cached]) == list(range(self.num_pages))
        assert self._readers == [readers[page] for page in range(self.num_pages)]
        self.tree.check(readers)
        s = self.statistics()
        assert (s.free, s.cached) == (len(self._free), len(cached)), s
        assert s.leased == len(own) + len(loose) and s.free + s.leased + s.cached == s.total, s
        assert s.retiring == sum(len(lease.pages) - lease.num_shared for lease in retiring), s
        for dispatch, waiting in self._retiring.items():
            assert dispatch > self._parsed and waiting, (dispatch, self._parsed)
            assert all(lease.released and lease.last_dispatch == dispatch for lease in waiting)
        assert not any(lease.released for lease in self._leases)
