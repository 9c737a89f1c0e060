"""Waiting prompts by how much of each is cached: a radix tree in which a change moves one node.

Ten thousand waiting requests may share a prefix, and its insertion or eviction changes the match of
every one of them. Here it changes one node. Knows page keys. Knows no page, no pool and no policy.

A node holds a *run* of page keys that all requests below it have. The first `cached` keys of a run
are cached; only whole runs may have cached children, because pages are cached parents first. So all
requests whose prompts part ways with the cache inside one run, or right behind it, have the same
match: that of the deepest cached node on their way.

A node that is cached is a *home*, and a request lives in the deepest home on its way. So all who
live in a home have one match, the home's, and a change of the cache writes a number in its home and
in those below it that are not cached. Only when a run is first cached, or none of it is cached any
more, do requests move, and they are few: a node that a crowd goes through is made a home before,
and stays one while there is a crowd. So a prefix that a crowd waits for may go and come back, and
homes that are not cached are few.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final, Generic, TypeVar

from .events import Takes
from .prefix_tree import NO_PARENT, Cleared, Removed, Stored

Rank = Any
"""How a request stands beside others with the same match: its number, or a tuple that ends in it;
unique, smallest first."""


class Node:
    """See the module docstring. `ends` are the requests that end here, with their lanes, and live
    in `home`; `num_waiting` of those who live there end here or below: all, if it is the home's
    node. `since` numbers the nodes by when somebody first waited there."""

    __slots__ = (
        "cached",
        "children",
        "ends",
        "home",
        "num_waiting",
        "parent",
        "run",
        "since",
        "start",
    )

    def __init__(self, parent: "Node | None", run: tuple[bytes, ...], start: int, since: int):
        self.parent, self.run, self.start, self.since = parent, run, start, since
        self.cached = self.num_waiting = 0
        self.children: dict[bytes, Node] = {}
        self.ends: dict[Rank, str] = {}
        self.home: Any = parent and parent.home


class Home:
    """The requests that find `match` pages cached, as far as they live here; `below` are the homes
    below with none between."""

    __slots__ = ("above", "below", "match", "node")

    def __init__(self, node: Node, above: "Home | None"):
        self.node = node
        self.above: Any = above  # like those below of the tree's own class
        self.below: dict[Any, None] = {}
        self.match = node.start + node.cached if node.cached or above is None else above.match


SomeHome = TypeVar("SomeHome", bound=Home)


class PromptTree(ABC, Generic[SomeHome]):
    """Waiting requests, each under a rank and the keys of the pages its prompt could find cached.

    The caller reports every change of the prefix cache, and for a new request how many of its keys
    are cached. A subclass says what a home keeps of the requests that live in it.
    """

    crowd: ClassVar[int] = 64
    """So many make a home of a node that is not cached: no more will have to move when it is."""

    def __init__(self) -> None:
        self._node_of: dict[Rank, Node] = {}
        self._at: dict[bytes, Node] = {}  # cached keys on waiting ways
        self._num_grown = 0
        self._root: Final = Node(None, (), 0, 0)
        self._root.home = self._make_home(self._root, None)
        self._changes: Final[Takes] = {
            Stored: self._stored,
            Removed: self._removed,
            Cleared: self._cleared,
        }
        self.takes: Final[Takes] = dict.fromkeys(self._changes, self.on)

    # What a subclass keeps.

    @abstractmethod
    def _make_home(self, node: Node, above: SomeHome | None) -> SomeHome:
        """A home without requests."""

    @abstractmethod
    def _enter(self, home: SomeHome, rank: Rank, lane: str) -> None:
        """A request lives here from now on."""

    @abstractmethod
    def _leave(self, home: SomeHome, rank: Rank, lane: str) -> None:
        """It no longer does."""

    def _rematched(self, home: SomeHome, before: int) -> None:
        """Those who live here had the match `before`."""

    def _moving_up(self, home: SomeHome) -> None:
        """All who live here will live in the home above, which has the same match."""

    def _unmake_home(self, home: SomeHome) -> None:
        """Nobody lives here, and no home is below any more."""

    def _put_below(self, home: SomeHome, above: SomeHome) -> None:
        """`home` gets another above it: one that was made between, or that of one that goes."""
        assert home.above is not None
        del home.above.below[home]
        home.above = above
        above.below[home] = None

    # Requests.

    def __len__(self) -> int:
        return len(self._node_of)

    def add(self, rank: Rank, keys: Sequence[bytes], num_cached: int, *, lane: str = "") -> None:
        """Let a request wait; `num_cached` of `keys` are cached. No two ranks are equal."""
        node = self._node_of[rank] = self._descend(tuple(keys), num_cached)
        node.ends[rank] = lane
        self._enter(node.home, rank, lane)
        self._count(node, 1)

    def remove(self, rank: Rank) -> None:
        """Take a request out."""
        node = self._node_of.pop(rank)
        self._count(node, -1)
        self._leave(node.home, rank, node.ends.pop(rank))
        while not node.ends and not node.children and node.parent is not None:
            self._unlink(node)
            node = node.parent

    def match(self, rank: Rank) -> int:
        """Pages of the request's prompt that are cached."""
        return self._node_of[rank].home.match

    def _count(self, node: Node, change: int) -> None:
        """Note that more or fewer wait at `node`; a crowd that grew gets a home, as far up as may
        be."""
        crowded = None
        while node.home.node is not node:
            node.num_waiting += change
            if change > 0 and node.num_waiting >= self.crowd:
                crowded = node
            assert node.parent is not None  # the root is a home's node
            node = node.parent
        node.num_waiting += change
        if crowded is not None:
            self._make_home_of(crowded)

    # The cache.

    def on(self, change: Stored | Removed | Cleared) -> None:
        """Take note of a change of the cache."""
        if self._node_of:  # else there is nobody to whom it could matter
            self._changes[type(change)](change)

    def _stored(self, change: Stored) -> None:
        keys, place = change.keys, 0
        node = self._root if change.parent_key == NO_PARENT else self._at.get(change.parent_key)
        while node is not None and place < len(keys):
            if node.cached == len(node.run):
                node = node.children.get(keys[place])
                continue
            common = _num_common(node.run, node.cached, keys, place)
            if not common:
                break
            self._set_cached(node, node.cached + common)
            place += common

    def _removed(self, change: Removed) -> None:
        if self._at.keys().isdisjoint(change.keys):
            return  # mostly: and this is the fastest way to know
        # Children come before parents, so that the last key of a run to go says what is left of it.
        last: dict[Node, bytes] = {}
        for key in change.keys:
            node = self._at.get(key)
            if node is not None:
                last[node] = key
        for node, key in last.items():
            self._set_cached(node, node.run.index(key))

    def _cleared(self, change: Cleared) -> None:
        # Deepest first, as evictions come.
        for node in sorted(set(self._at.values()), key=lambda node: -node.start):
            self._set_cached(node, 0)

    def _set_cached(self, node: Node, cached: int) -> None:
        for key in node.run[cached : node.cached]:
            del self._at[key]
        self._at.update(dict.fromkeys(node.run[node.cached : cached], node))
        node.cached = cached
        if node.home.node is not node:
            self._make_home_of(node)
        elif cached:
            self._rematch(node.home, node.start + cached)
        else:
            self._rematch(node.home, node.home.above.match)
            self._dissolve_unless_crowd(node)

    def _rematch(self, home: SomeHome, match: int) -> None:
        for found in cached_alike(home):
            before, found.match = found.match, match
            self._rematched(found, before)

    def _make_home_of(self, node: Node) -> None:
        """Those below `node` live in homes below it, or in the one above, and move in."""
        above = node.home
        assert node.parent is not None
        self._count(node.parent, -node.num_waiting)
        home = self._make_home(node, above)
        above.below[home] = None
        nodes = [node]
        for each in nodes:  # which grows meanwhile
            each.home = home
            for rank, lane in each.ends.items():
                self._leave(above, rank, lane)
                self._enter(home, rank, lane)
            for child in each.children.values():
                if child.home is above:
                    nodes.append(child)
                else:
                    self._put_below(child.home, home)
                    if not child.cached:
                        self._rematch(child.home, home.match)
        self._rematched(home, above.match)

    def _dissolve_unless_crowd(self, node: Node) -> None:
        """Of a home's node that is not cached."""
        if node.num_waiting >= self.crowd:
            return
        home, above = node.home, node.home.above
        self._moving_up(home)
        nodes = [node]
        for each in nodes:  # which grows meanwhile
            each.home = above
            for rank, lane in each.ends.items():
                self._leave(home, rank, lane)
                self._enter(above, rank, lane)
            nodes += [child for child in each.children.values() if child.home is home]
        for below in list(home.below):
            self._put_below(below, above)
        del above.below[home]
        self._unmake_home(home)
        assert node.parent is not None
        self._count(node.parent, node.num_waiting)

    # The tree.

    def _descend(self, keys: tuple[bytes, ...], num_cached: int) -> Node:
        """The node where `keys` end, made if need be."""
        node, place = self._root, 0
        while place < len(keys):
            child = node.children.get(keys[place])
            if child is None:
                return self._grow(node, keys[place:], max(0, num_cached - place))
            run = child.run
            if keys[place : place + len(run)] == run:
                node, place = child, place + len(run)
            else:
                common = _num_common(run, 0, keys, place)
                node, place = self._split(child, common), place + common
        return node

    def _grow(self, parent: Node, run: tuple[bytes, ...], cached: int) -> Node:
        self._num_grown += 1
        node = Node(parent, run, parent.start + len(parent.run), self._num_grown)
        parent.children[run[0]] = node
        if cached:
            self._set_cached(node, min(cached, len(run)))
        return node

    def _split(self, lower: Node, length: int) -> Node:
        """Cut a run in two; the new node is the upper one. Who lives in `lower` stays there."""
        parent = lower.parent
        assert parent is not None
        upper = Node(parent, lower.run[:length], lower.start, lower.since)
        parent.children[upper.run[0]] = upper
        upper.children[lower.run[length]] = lower
        lower.parent, lower.run = upper, lower.run[length:]
        cached, is_home = lower.cached, lower.home.node is lower
        upper.num_waiting = 0 if is_home else lower.num_waiting
        lower.start, lower.cached = lower.start + length, max(0, cached - length)
        if cached:
            self._set_cached(upper, min(cached, length))
        if is_home and not lower.cached:
            self._dissolve_unless_crowd(lower)
        return upper

    def _unlink(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.run[0]]
        if node.home.node is node:
            for key in node.run[: node.cached]:
                del self._at[key]
            del node.home.above.below[node.home]
            self._unmake_home(node.home)
        node.home = None  # which knows the node: both shall go at once, and not by way of a cycle


def way_up(node: Node | None) -> Iterator[Node]:
    """A node and those above it."""
    while node is not None:
        yield node
        node = node.parent


def cached_alike(home: SomeHome) -> list[SomeHome]:
    """The home, and those below that have its match because they are not cached."""
    found = [home]
    for each in found:  # which grows meanwhile
        found += [below for below in each.below if not below.node.cached]
    return found


def _num_common(run: Sequence[bytes], start: int, keys: Sequence[bytes], place: int) -> int:
    """How many keys of `run` from `start` on are those of `keys` from `place` on."""
    common = 0
    for ours, theirs in zip(run[start:], keys[place:], strict=False):
        if ours != theirs:
            break
        common += 1
    return common
