"""Waiting prompts by how much of each is cached: a radix tree in which a change moves one node.

Orders that care for cached prefixes ask who has the longest match. Ten thousand waiting requests
may share a prefix, and its insertion or eviction changes the match of every one of them; here it
changes one node. Knows page keys and ranks. Knows no page, no pool and no policy.

A node holds a *run* of page keys that all requests below it have. The first `cached` keys of a run
are cached; only whole runs may have cached children, because pages are cached parents first. So all
requests whose prompts part ways with the cache inside one run, or right behind it, have the same
match: they are that node's *group*. A node's members are the ranks of the requests that end in it
and the least rank below each child of which nothing is cached. The group of a node is then what
its members lead to, its match is `start + cached`, and groups are sorted by that.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from sortedcontainers import SortedDict, SortedList

from .prefix_tree import NO_PARENT, Cleared, Removed, Stored

Rank = tuple[Any, ...]
"""How a request stands beside others with the same match; unique, smallest first."""

GroupKey = Callable[[int, Rank], tuple[Any, ...]]
"""How a group stands beside others: by its match in pages and its least rank; smallest first."""

OnMatch = Callable[[list[Rank], int], None]
"""Told whose match a change of the cache has changed, and what it is now, in pages."""


def longest_match(match: int, least: Rank) -> tuple[Any, ...]:
    """Longest match first, then by rank."""
    return (-match, *least)


class Node:
    """See the module docstring. `fresh` maps the least rank of each uncached child to it;
    `posted` is the least rank that the index or the parent knows."""

    __slots__ = ("cached", "children", "fresh", "members", "parent", "posted", "run", "start")

    def __init__(self, parent: "Node | None", run: tuple[bytes, ...], start: int, cached: int):
        self.parent, self.run, self.start, self.cached = parent, run, start, cached
        self.children: dict[bytes, Node] = {}
        self.fresh: dict[Rank, Node] = {}
        self.members: SortedList = SortedList()
        self.posted: Rank | None = None


class WaitingTree:
    """Waiting requests, each under a rank and the keys of the pages its prompt could find cached.

    The caller reports every change of the prefix cache, and for a new request how many of its keys
    are cached. Who asks for `on_match` pays for it by the number of requests that it names.
    """

    def __init__(self, group_key: GroupKey = longest_match, *, on_match: OnMatch | None = None):
        self._group_key = group_key
        self._on_match = on_match
        self._root: Final = Node(None, (), 0, 0)
        self._node_of: dict[Rank, Node] = {}
        self._groups: SortedDict = SortedDict()  # key -> node
        self._at: dict[bytes, Node] = {}  # cached keys on waiting paths

    def __len__(self) -> int:
        return len(self._node_of)

    def add(self, rank: Rank, keys: Sequence[bytes], num_cached: int) -> None:
        """Let a request wait; `num_cached` of `keys` are cached."""
        node = self._descend(tuple(keys), num_cached)
        node.members.add(rank)
        self._node_of[rank] = node
        self._post(node)

    def remove(self, rank: Rank) -> None:
        """Take a request out."""
        node = self._node_of.pop(rank)
        node.members.remove(rank)
        self._post(node)
        while not node.members and not node.children and node.parent is not None:
            self._unlink(node)
            node = node.parent

    def first(self) -> Rank | None:
        """Who stands first."""
        if not self._groups:
            return None
        node = self._groups.peekitem(0)[1]
        return node.members[0]

    def match(self, rank: Rank) -> int:
        """Pages of the request's prompt that are cached."""
        node = self._node_of[rank]
        while not node.cached and node.parent is not None:
            node = node.parent
        return node.start + node.cached

    def __iter__(self) -> Iterator[Rank]:
        """All, the first one first. A change ends the iteration: ask anew."""
        groups = iter(self._groups.items())
        upcoming = next(groups, None)
        # (key, tie-break, rank, match, the rest of the group)
        heap: list[Any] = []
        num_groups = 0
        while upcoming is not None or heap:
            while upcoming is not None and (not heap or upcoming[0] <= heap[0][0]):
                key, node = upcoming
                num_groups += 1
                rest = members_of(node)
                heapq.heappush(heap, (key, num_groups, next(rest), node.start + node.cached, rest))
                upcoming = next(groups, None)
            _, number, rank, match, rest = heapq.heappop(heap)
            yield rank
            following = next(rest, None)
            if following is not None:
                key = self._group_key(match, following)
                heapq.heappush(heap, (key, number, following, match, rest))

    # ------------------------------------------------------------------------------ the cache

    def on(self, change: Stored | Removed | Cleared) -> bool:
        """Take note of a change of the cache; whether it concerns anybody here."""
        match change:
            case Stored(parent_key=parent_key, keys=keys):
                return self._stored(parent_key, keys)
            case Removed(keys=keys):
                return self._removed(keys)
            case Cleared():
                return self._cleared()

    def _stored(self, parent_key: bytes, keys: Sequence[bytes]) -> bool:
        node = self._root if parent_key == NO_PARENT else self._at.get(parent_key)
        place = 0
        while node is not None and place < len(keys):
            if node.cached == len(node.run):
                node = node.children.get(keys[place])
                continue
            taken = 0
            limit = min(len(node.run) - node.cached, len(keys) - place)
            while taken < limit and node.run[node.cached + taken] == keys[place + taken]:
                taken += 1
            if not taken:
                break
            self._set_cached(node, node.cached + taken)
            place += taken
        return place > 0

    def _removed(self, keys: Sequence[bytes]) -> bool:
        # Children come before parents, so that the last key of a run to go says what is left of it.
        left: dict[Node, int] = {}
        for key in keys:
            node = self._at.get(key)
            if node is not None:
                left[node] = node.run.index(key)
        for node, cached in left.items():
            self._set_cached(node, cached)
        return bool(left)

    def _cleared(self) -> bool:
        known = bool(self._at)
        # Deepest first, as evictions come.
        nodes = sorted(set(self._at.values()), key=lambda node: -node.start)
        for node in nodes:
            self._set_cached(node, 0)
        return known

    def _set_cached(self, node: Node, cached: int) -> None:
        for key in node.run[cached : node.cached]:
            del self._at[key]
        self._at.update(dict.fromkeys(node.run[node.cached : cached], node))
        self._withdraw(node)
        node.cached = cached
        self._post(node)
        if node.parent is not None:
            self._post(node.parent)  # which may just have lost a member
        if self._on_match is not None:
            # Where nothing is left, all above is cached: children go before parents.
            self._on_match(_group(node), node.start + node.cached)

    # ------------------------------------------------------------------------------- the tree

    def _descend(self, keys: tuple[bytes, ...], num_cached: int) -> Node:
        """The node where `keys` end, made if need be."""
        node, place = self._root, 0
        while place < len(keys):
            child = node.children.get(keys[place])
            if child is None:
                return self._grow(node, keys[place:], max(0, num_cached - place))
            common = _num_common(child.run, keys, place)
            node = child if common == len(child.run) else self._split(child, common)
            place += common
        return node

    def _grow(self, parent: Node, run: tuple[bytes, ...], cached: int) -> Node:
        node = Node(parent, run, parent.start + len(parent.run), min(cached, len(run)))
        parent.children[run[0]] = node
        self._at.update(dict.fromkeys(run[: node.cached], node))
        return node

    def _split(self, lower: Node, length: int) -> Node:
        """Cut a run in two; the new node is the upper one."""
        parent = lower.parent
        assert parent is not None
        self._withdraw(lower)
        upper = Node(parent, lower.run[:length], lower.start, min(lower.cached, length))
        parent.children[upper.run[0]] = upper
        upper.children[lower.run[length]] = lower
        lower.parent, lower.run = upper, lower.run[length:]
        lower.start, lower.cached = lower.start + length, max(0, lower.cached - length)
        self._at.update(dict.fromkeys(upper.run[: upper.cached], upper))
        self._post(lower)
        return upper

    def _unlink(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.run[0]]
        for key in node.run[: node.cached]:
            del self._at[key]

    # ----------------------------------------------------------------------------- the groups

    def _post(self, node: Node) -> None:
        """Show the node's least rank where it is looked for: in the index, or to its parent."""
        while True:
            least = _least(node)
            if least == node.posted:
                return
            self._withdraw(node)
            node.posted = least
            parent = node.parent
            if node.cached or parent is None:
                if least is not None:
                    self._groups[self._group_key(node.start + node.cached, least)] = node
                return
            if least is not None:
                parent.fresh[least] = node
                parent.members.add(least)
            node = parent

    def _withdraw(self, node: Node) -> None:
        """Undo what `_post` did; whoever calls it posts again, and so the nodes above."""
        least, parent = node.posted, node.parent
        if least is None:
            return
        node.posted = None
        if node.cached or parent is None:
            del self._groups[self._group_key(node.start + node.cached, least)]
        else:
            del parent.fresh[least]
            parent.members.remove(least)


def _least(node: Node) -> Rank | None:
    members: Any = node.members  # whose types do not say what they hold
    return members[0] if members else None


def _group(node: Node) -> list[Rank]:
    """The ranks that `node`'s members lead to, in no order."""
    ranks: list[Rank] = []
    nodes = [node]
    while nodes:
        node = nodes.pop()
        for rank in node.members:
            child = node.fresh.get(rank)
            if child is None:
                ranks.append(rank)
            else:
                nodes.append(child)
    return ranks


def members_of(node: Node) -> Iterator[Rank]:
    """The ranks of a group, least first."""
    if not node.members:
        return
    # (rank, tie-break, node, place among the node's members)
    heap: list[Any] = [(node.members[0], 0, node, 0)]
    num_pushed = 0
    while heap:
        rank, _, node, place = heapq.heappop(heap)
        child = node.fresh.get(rank)
        if child is None:
            yield rank
        else:
            num_pushed += 1
            heapq.heappush(heap, (rank, num_pushed, child, 0))
        if place + 1 < len(node.members):
            num_pushed += 1
            heapq.heappush(heap, (node.members[place + 1], num_pushed, node, place + 1))


def _num_common(run: tuple[bytes, ...], keys: tuple[bytes, ...], place: int) -> int:
    """How many keys of `run` are those of `keys` from `place` on."""
    if keys[place : place + len(run)] == run:
        return len(run)
    common = 0
    for ours, theirs in zip(run, keys[place:], strict=False):
        if ours != theirs:
            break
        common += 1
    return common
