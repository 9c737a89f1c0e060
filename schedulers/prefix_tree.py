"""Which cached page holds which tokens: a tree of whole pages under chained keys.

The tree knows keys, page numbers and how often a page is held. It knows no lease, dispatch or
free list: `pages.py` owns those and asks here for matches, for room, and for the events.

Why eviction is one `OrderedDict`. A node is *held* while a lease reads its page or a child of it
is held, so a held node's ancestors are held too. A node that stops being held joins the end of
`_idle`, and it can stop only after its children did. Hence in `_idle` every node stands behind
all of its descendants: the front is always a leaf, taking from the front is LRU over unreferenced
leaves, and everything in `_idle` can be evicted, so `len(_idle)` is exact. All of it is O(1) and
runs on the order of calls alone: no clock, no ticks. A heap of leaves was the other way; it must
push a parent with its old tick each time its last child goes, for the same order at O(log n).

Since only leaves go, the cached part of a key chain is always a prefix of it. Matching is
therefore a binary search over the chain, not a walk.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, Final

import numpy as np

KEY_BYTES: Final = 16
NO_PARENT: Final = bytes(KEY_BYTES)
"""The parent key of a first page."""
PREFIX_SCOPES: Final = ("client", "group", "all")


def prefix_scope(mode: str, *, client: str, group: str) -> str:
    """Who may share pages with this request, as the `scope` of `page_keys`.

    Raises ValueError for a mode that is not in `PREFIX_SCOPES`, and for an empty client or group
    where the mode asks for one: an empty name would put all nameless callers into one scope.
    """
    match mode:
        case "all":
            return "all"
        case "client" | "group":
            name = client if mode == "client" else group
            if not name:
                raise ValueError(
                    f"prefix_scope {mode!r} needs a {mode} name, got ''; "
                    "name the caller or set --prefix_scope=all"
                )
            return f"{mode}:{name}"
    raise ValueError(f"prefix_scope must be one of {', '.join(PREFIX_SCOPES)}, got {mode!r}")


def page_keys(
    tokens: np.ndarray, *, page_size: int, scope: str, model: str, parent: bytes = NO_PARENT
) -> list[bytes]:
    """One key of 16 bytes for each whole page of `tokens` [T] int32; a last partial page has none.

    A key is blake2b-128 over scope and model, the key of the page before, and the page's tokens as
    little-endian int32: equal in every process, and equal only if everything before is equal too.
    To go on behind tokens hashed earlier, pass the tokens that follow a whole page and that page's
    key as `parent`. Raises TypeError when `tokens` is not a vector of int32.
    """
    if tokens.dtype != np.int32 or tokens.ndim != 1:
        raise TypeError(
            f"tokens must be a vector of int32, got {tokens.dtype} of shape {tokens.shape}; "
            "try np.asarray(ids, np.int32)"
        )
    base = _base(scope, model)
    data = tokens.astype("<i4", copy=False).tobytes()
    page_bytes = 4 * page_size
    keys = []
    for start in range(0, len(data) - page_bytes + 1, page_bytes):
        page = base.copy()  # copying is 0.5 us a page where a fresh blake2b(...) is 0.75 us
        page.update(parent + data[start : start + page_bytes])
        parent = page.digest()
        keys.append(parent)
    return keys


@lru_cache(maxsize=256)
def _base(scope: str, model: str) -> Any:
    """What the hash of every page begins with; to be copied."""
    # Scope and model are reduced to 16 bytes first: with the parent and 16 tokens a page is then
    # 96 bytes, one blake2b block. The length in front keeps ("a", "bc") apart from ("ab", "c").
    scope_utf8 = scope.encode()
    origin = len(scope_utf8).to_bytes(4, "little") + scope_utf8 + model.encode()
    return blake2b(blake2b(origin, digest_size=KEY_BYTES).digest(), digest_size=KEY_BYTES)


@dataclass(slots=True)
class Stored:
    """`keys` were cached, each the child of the one before, the first of `parent_key`. Nobody
    changes an event; they are not frozen, which takes three times as long to make."""

    seq: int
    parent_key: bytes
    keys: tuple[bytes, ...]


@dataclass(slots=True)
class Removed:
    """`keys` were evicted, children before parents."""

    seq: int
    keys: tuple[bytes, ...]


@dataclass(slots=True)
class Cleared:
    """Nothing is cached any more."""

    seq: int


KvEvent = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Resumed:
    """Every event after the number asked for, consecutive."""

    events: tuple[KvEvent, ...]


@dataclass(frozen=True, slots=True)
class Gap:
    """Cannot resume from the number asked for: take a snapshot. Only `first`..`last` are kept."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is cached after event `seq`, as (parent key, key), parents before children."""

    seq: int
    pages: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class PrefixStatistics:
    """Pages by state, and what admitted requests found. `pinned + evictable == cached`.

    `query_tokens` counts the whole pages an admitted request asked for, `hit_tokens` those found.
    """

    cached: int
    pinned: int
    evictable: int
    lookups: int
    query_tokens: int
    hit_tokens: int
    evictions: int
    last_seq: int


class _Node:
    """A cached page. `holds` counts its readers as one, plus one for each held child."""

    __slots__ = ("holds", "key", "page", "parent")

    def __init__(self, key: bytes, page: int, parent: "_Node | None", holds: int):
        self.key, self.page, self.parent, self.holds = key, page, parent, holds


@dataclass(slots=True)
class Match:
    """The longest cached prefix of `num_queried` keys: its pages in order.

    Reserves nothing, and is good until the pool next evicts one of its pages or clears.
    """

    pages: tuple[int, ...]
    num_queried: int
    node: _Node | None = field(repr=False, compare=False)

    @property
    def num_pages(self) -> int:
        return len(self.pages)


class PrefixTree:
    """The cached pages of one pool, which is the only caller of what changes them.

    `on_change` hears of every event as it happens.
    """

    def __init__(
        self,
        page_size: int,
        *,
        num_events_kept: int = 4096,
        on_change: Callable[[KvEvent], None] = lambda event: None,
    ):
        self._page_size = page_size
        self.on_change = on_change
        self._nodes: dict[bytes, _Node] = {}  # parents before children, as children go first
        self._node_at: dict[int, _Node] = {}  # by page
        self._idle: OrderedDict[int, _Node] = OrderedDict()  # by page; see the module docstring
        self._events: deque[KvEvent] = deque(maxlen=num_events_kept)
        self._last_seq = 0
        self._lookups = self._pages_queried = self._pages_hit = self._evictions = 0

    # Reading: for admission, policies and subscribers.

    @property
    def num_cached(self) -> int:
        return len(self._nodes)

    @property
    def num_evictable(self) -> int:
        return len(self._idle)

    def __contains__(self, page: int) -> bool:
        return page in self._node_at

    def num_matched(self, keys: Sequence[bytes], *, guess: int = 0) -> int:
        """How many leading pages of the chain `keys` are cached; O(log len(keys)), or O(1) where
        it is as many as `guess`."""
        nodes = self._nodes
        if guess and keys[guess - 1] in nodes and (guess == len(keys) or keys[guess] not in nodes):
            return guess
        return bisect_left(keys, True, key=lambda key: key not in nodes)

    def match(self, keys: Sequence[bytes], *, guess: int = 0) -> Match:
        """The longest cached prefix of the chain `keys`, found at once where it has `guess` pages.
        Changes nothing, not even recency.

        A prompt has to run its last token again even when all of it is cached, and a shared page
        is never written: pass `keys[: (num_prompt_tokens - 1) // page_size]`.
        """
        num_pages = self.num_matched(keys, guess=guess)
        nodes = self._nodes
        pages = tuple([nodes[key].page for key in keys[:num_pages]])
        return Match(pages, len(keys), nodes[keys[num_pages - 1]] if num_pages else None)

    def num_idle(self, match: Match) -> int:
        """How many pages of `match` are evictable now, and would no longer be once it is read."""
        # The held part of a path is its upper end, so only the idle part is walked.
        count, node = 0, match.node
        while node is not None and not node.holds:
            count, node = count + 1, node.parent
        return count

    def events_since(self, seq: int) -> Resumed | Gap:
        """The events after number `seq`; a Gap when they are not all kept, or `seq` is not ours."""
        first = self._last_seq - len(self._events) + 1
        if not first - 1 <= seq <= self._last_seq:
            return Gap(first, self._last_seq)
        newest = islice(reversed(self._events), self._last_seq - seq)  # few of many, as a rule
        return Resumed(tuple(newest)[::-1])

    def snapshot(self) -> Snapshot:
        """All cached keys, and the number to go on from; O(cached)."""
        pages = ((n.parent.key if n.parent else NO_PARENT, n.key) for n in self._nodes.values())
        return Snapshot(self._last_seq, tuple(pages))

    def statistics(self) -> PrefixStatistics:
        return PrefixStatistics(
            cached=len(self._nodes),
            pinned=len(self._nodes) - len(self._idle),
            evictable=len(self._idle),
            lookups=self._lookups,
            query_tokens=self._pages_queried * self._page_size,
            hit_tokens=self._pages_hit * self._page_size,
            evictions=self._evictions,
            last_seq=self._last_seq,
        )

    # Changing: for the pool.

    def admit(self, match: Match) -> None:
        """Count a lookup that led to a lease; a waiting request may look every slice, uncounted."""
        node = match.node
        assert node is None or self._nodes.get(node.key) is node, "match is stale: match again"
        self._lookups += 1
        self._pages_queried += match.num_queried
        self._pages_hit += len(match.pages)

    def hold(self, pages: Sequence[int]) -> None:
        """Each of the cached `pages`, parents before children, has a first reader."""
        node_at = self._node_at
        for page in reversed(pages):  # the last one climbs the path, the others only count
            node = node_at[page]
            node.holds += 1
            if node.holds == 1:
                del self._idle[page]
                self._hold(node.parent)

    def _hold(self, node: _Node | None) -> None:
        while node is not None:
            node.holds += 1
            if node.holds > 1:
                return
            del self._idle[node.page]
            node = node.parent

    def drop(self, pages: Sequence[int]) -> list[int]:
        """Each of `pages` lost its last reader; returns those that are not cached."""
        node_at, idle = self._node_at, self._idle
        loose = []
        for page in pages:
            node = node_at.get(page)
            if node is None:
                loose.append(page)
            while node is not None:
                node.holds -= 1
                if node.holds:
                    break
                idle[node.page] = node
                node = node.parent
        return loose

    def adopt(self, keys: Sequence[bytes], pages: Sequence[int], *, num_known: int = 0) -> None:
        """Cache `pages[i]` under `keys[i]` where that key is new; each of them has a reader. The
        first `num_known` are cached, probably, and no more.

        A page whose key is cached already stays with its lease. Only the pages behind the cached
        prefix are new, so the cost is O(new pages), and one Stored event tells it all.
        """
        first, nodes, node_at = self.num_matched(keys, guess=num_known), self._nodes, self._node_at
        if first == len(keys):
            return
        parent = nodes[keys[first - 1]] if first else None
        parent_key = parent.key if parent else NO_PARENT
        self._hold(parent)
        new = tuple(keys[first:])
        for key, page in zip(new, pages[first : len(keys)], strict=True):
            assert page not in node_at, f"page {page} is cached already, under another key"
            parent = nodes[key] = node_at[page] = _Node(key, page, parent, 2)
        assert parent is not None
        parent.holds = 1  # its reader; the others have a held child as well
        self._last_seq += 1
        self._tell(Stored(self._last_seq, parent_key, new))

    def evict(self, num_pages: int) -> list[int]:
        """Forget the `num_pages` least recently used unreferenced pages, leaves first."""
        assert 0 < num_pages <= len(self._idle), (num_pages, len(self._idle))
        gone = [self._idle.popitem(last=False)[1] for _ in range(num_pages)]
        for node in gone:
            del self._nodes[node.key], self._node_at[node.page]
        self._evictions += num_pages
        self._last_seq += 1
        self._tell(Removed(self._last_seq, tuple([node.key for node in gone])))
        return [node.page for node in gone]

    def clear(self) -> list[int]:
        """Forget everything, pages with readers too; returns all pages that were cached."""
        pages = list(self._node_at)
        self._nodes.clear()
        self._node_at.clear()
        self._idle.clear()
        self._last_seq += 1
        self._tell(Cleared(self._last_seq))
        return pages

    def _tell(self, event: KvEvent) -> None:
        self._events.append(event)
        self.on_change(event)

    def check(self, read_pages: Collection[int]) -> None:
        """Recount every law, given the pages that leases read; O(cached). Raises AssertionError."""
        nodes = set(self._nodes.values())
        assert len(nodes) == len(self._nodes) == len(self._node_at)
        for node in nodes:
            assert self._nodes[node.key] is node and self._node_at[node.page] is node
        held_children: Counter[_Node] = Counter()
        for node in nodes:
            assert node.parent is None or node.parent in nodes, "a parent went before its child"
            if node.holds and node.parent:
                held_children[node.parent] += 1
        for node in nodes:
            assert node.holds == (node.page in read_pages) + held_children[node], node.page
        assert set(self._idle.values()) == {node for node in nodes if not node.holds}
        seen: set[_Node] = set()
        for node in self._idle.values():
            assert node.parent not in seen, "an idle parent stands before its child"
            seen.add(node)
        seqs = [event.seq for event in self._events]
        assert seqs == list(range(self._last_seq - len(seqs) + 1, self._last_seq + 1))
