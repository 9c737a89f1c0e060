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

Requests wait in *lanes*, one per client for orders that ask client by client. A node keeps members
for each lane that has some; a change of the cache costs by the lanes it concerns.
"""

import heapq
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

from sortedcontainers import SortedDict, SortedList

from .prefix_tree import NO_PARENT, Cleared, Removed, Stored

Rank = tuple[Any, ...]
"""How a request stands beside others with the same match; unique, smallest first."""

GroupKey = Callable[[int, Rank], tuple[Any, ...]]
"""How a group stands beside others: by its match in pages and its least rank; smallest first."""

OnMatch = Callable[[list[Rank], int], None]
"""Told whose match a change of the cache has changed, and what it is now, in pages."""


NO_LANES: Final[frozenset[str]] = frozenset()


def longest_match(match: int, least: Rank) -> tuple[Any, ...]:
    """Longest match first, then by rank."""
    return (-match, *least)


class _Lane:
    """One lane's members of a node. `fresh` maps the least rank of each uncached child to it;
    `posted` is the least rank that the index or the parent knows."""

    __slots__ = ("fresh", "members", "posted")

    def __init__(self) -> None:
        self.fresh: dict[Rank, Node] = {}
        self.members: SortedList = SortedList()
        self.posted: Rank | None = None


class Node:
    """See the module docstring."""

    __slots__ = ("cached", "children", "lanes", "parent", "run", "start")

    def __init__(self, parent: "Node | None", run: tuple[bytes, ...], start: int, cached: int):
        self.parent, self.run, self.start, self.cached = parent, run, start, cached
        self.children: dict[bytes, Node] = {}
        self.lanes: dict[str, _Lane] = {}

    def lane(self, name: str) -> _Lane:
        """The lane, made if need be."""
        found = self.lanes.get(name)
        if found is None:
            found = self.lanes[name] = _Lane()
        return found


class WaitingTree:
    """Waiting requests, each under a rank and the keys of the pages its prompt could find cached.

    The caller reports every change of the prefix cache, and for a new request how many of its keys
    are cached. Who asks for `on_match` pays for it by the number of requests that it names.
    """

    def __init__(self, group_key: GroupKey = longest_match, *, on_match: OnMatch | None = None):
        self._group_key = group_key
        self._on_match = on_match
        self._root: Final = Node(None, (), 0, 0)
        self._place_of: dict[Rank, tuple[Node, str]] = {}
        self._groups: dict[str, SortedDict] = {}  # lane -> key -> node
        self._at: dict[bytes, Node] = {}  # cached keys on waiting paths

    def __len__(self) -> int:
        return len(self._place_of)

    def add(self, rank: Rank, keys: Sequence[bytes], num_cached: int, *, lane: str = "") -> None:
        """Let a request wait; `num_cached` of `keys` are cached. No two ranks are equal."""
        node = self._descend(tuple(keys), num_cached)
        node.lane(lane).members.add(rank)
        self._place_of[rank] = node, lane
        self._post(node, lane)

    def remove(self, rank: Rank) -> None:
        """Take a request out."""
        node, lane = self._place_of.pop(rank)
        node.lanes[lane].members.remove(rank)
        self._post(node, lane)
        while not node.lanes and not node.children and node.parent is not None:
            self._unlink(node)
            node = node.parent

    def first(self, lane: str = "") -> Rank | None:
        """Who stands first in a lane."""
        groups = self._groups.get(lane)
        if not groups:
            return None
        return groups.peekitem(0)[1].lanes[lane].posted

    def first_beside(self, passed: Callable[[Node], bool], lane: str = "") -> Rank | None:
        """Who stands first in a lane, leaving out all at and below nodes that are `passed`.

        Costs by the passed nodes that stand in front of it.
        """
        best: tuple[Any, Rank] | None = None
        for key, node in self._groups.get(lane, {}).items():
            if best is not None and best[0] < key:
                break
            rank = None if passed(node) else next(members_of(node, lane, passed), None)
            if rank is not None:
                found = self._group_key(node.start + node.cached, rank), rank
                best = found if best is None else min(best, found)
        return None if best is None else best[1]

    def match(self, rank: Rank) -> int:
        """Pages of the request's prompt that are cached."""
        return _match(self._place_of[rank][0])

    def ranks(self, lane: str = "") -> Iterator[Rank]:
        """A lane, the first one first. A change ends the iteration: ask anew."""
        groups = iter(self._groups.get(lane, {}).items())
        upcoming = next(groups, None)
        # (key, tie-break, rank, match, the rest of the group)
        heap: list[Any] = []
        num_groups = 0
        while upcoming is not None or heap:
            while upcoming is not None and (not heap or upcoming[0] <= heap[0][0]):
                key, node = upcoming
                num_groups += 1
                rest = members_of(node, lane)
                heapq.heappush(heap, (key, num_groups, next(rest), node.start + node.cached, rest))
                upcoming = next(groups, None)
            _, number, rank, match, rest = heapq.heappop(heap)
            yield rank
            following = next(rest, None)
            if following is not None:
                key = self._group_key(match, following)
                heapq.heappush(heap, (key, number, following, match, rest))

    # ------------------------------------------------------------------------------ the cache

    def on(self, change: Stored | Removed | Cleared) -> Collection[str]:
        """Take note of a change of the cache; the lanes it concerns."""
        match change:
            case Stored(parent_key=parent_key, keys=keys):
                return self._stored(parent_key, keys)
            case Removed(keys=keys):
                return self._removed(keys)
            case Cleared():
                return self._cleared()

    def _stored(self, parent_key: bytes, keys: Sequence[bytes]) -> Collection[str]:
        node = self._root if parent_key == NO_PARENT else self._at.get(parent_key)
        place, lanes = 0, NO_LANES
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
            lanes = lanes | self._set_cached(node, node.cached + taken)
            place += taken
        return lanes

    def _removed(self, keys: Sequence[bytes]) -> Collection[str]:
        # Children come before parents, so that the last key of a run to go says what is left of it.
        left: dict[Node, int] = {}
        for key in keys:
            node = self._at.get(key)
            if node is not None:
                left[node] = node.run.index(key)
        lanes = NO_LANES
        for node, cached in left.items():
            lanes = lanes | self._set_cached(node, cached)
        return lanes

    def _cleared(self) -> Collection[str]:
        lanes = NO_LANES
        # Deepest first, as evictions come.
        for node in sorted(set(self._at.values()), key=lambda node: -node.start):
            lanes = lanes | self._set_cached(node, 0)
        return lanes

    def _set_cached(self, node: Node, cached: int) -> frozenset[str]:
        """The lanes whose requests have another match now."""
        for key in node.run[cached : node.cached]:
            del self._at[key]
        self._at.update(dict.fromkeys(node.run[node.cached : cached], node))
        lanes = frozenset(node.lanes)
        for lane in lanes:
            self._withdraw(node, lane)
        node.cached = cached
        for lane in lanes:
            self._post(node, lane)
            if node.parent is not None:
                self._post(node.parent, lane)  # which may just have lost a member
        if self._on_match is not None:
            for lane in lanes:
                self._on_match(_group(node, lane), _match(node))
        return lanes

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
        for lane in lower.lanes:
            self._withdraw(lower, lane)
        upper = Node(parent, lower.run[:length], lower.start, min(lower.cached, length))
        parent.children[upper.run[0]] = upper
        upper.children[lower.run[length]] = lower
        lower.parent, lower.run = upper, lower.run[length:]
        lower.start, lower.cached = lower.start + length, max(0, lower.cached - length)
        self._at.update(dict.fromkeys(upper.run[: upper.cached], upper))
        for lane in lower.lanes:
            self._post(lower, lane)
        return upper

    def _unlink(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.run[0]]
        for key in node.run[: node.cached]:
            del self._at[key]

    # ----------------------------------------------------------------------------- the groups

    def _post(self, node: Node, name: str) -> None:
        """Show the lane's least rank where it is looked for: in the index, or to the parent."""
        while True:
            lane = node.lanes.get(name)
            if lane is None:
                return
            members: Any = lane.members  # whose types do not say what they hold
            least = members[0] if members else None
            if least == lane.posted and least is not None:
                return
            self._withdraw(node, name)
            if least is None:
                del node.lanes[name]
            lane.posted = least
            parent = node.parent
            if node.cached or parent is None:
                if least is not None:
                    groups = self._groups.setdefault(name, SortedDict())
                    groups[self._group_key(node.start + node.cached, least)] = node
                return
            if least is not None:
                above = parent.lane(name)
                above.fresh[least] = node
                above.members.add(least)
            node = parent

    def _withdraw(self, node: Node, name: str) -> None:
        """Undo what `_post` did; whoever calls it posts again, and so the nodes above."""
        lane, parent = node.lanes[name], node.parent
        least = lane.posted
        if least is None:
            return
        lane.posted = None
        if node.cached or parent is None:
            groups = self._groups[name]
            del groups[self._group_key(node.start + node.cached, least)]
            if not groups:
                del self._groups[name]
        else:
            above = parent.lanes[name]
            del above.fresh[least]
            above.members.remove(least)


def _match(node: Node) -> int:
    """Cached pages of the prompts that end in `node` or are in its group."""
    above = node
    while not above.cached and above.parent is not None:
        above = above.parent
    return above.start + above.cached


def _group(node: Node, name: str) -> list[Rank]:
    """The ranks that a lane's members of `node` lead to, in no order."""
    ranks: list[Rank] = []
    lanes = [node.lanes[name]] if name in node.lanes else []
    while lanes:
        lane = lanes.pop()
        for rank in lane.members:
            child = lane.fresh.get(rank)
            if child is None:
                ranks.append(rank)
            else:
                lanes.append(child.lanes[name])
    return ranks


def members_of(
    node: Node, name: str, passed: Callable[[Node], bool] | None = None
) -> Iterator[Rank]:
    """The ranks of a lane's group, least first, but for those below nodes that are `passed`."""
    if name not in node.lanes:
        return
    lane = node.lanes[name]
    # (rank, tie-break, lane, place among the lane's members)
    heap: list[Any] = [(lane.members[0], 0, lane, 0)]
    num_pushed = 0
    while heap:
        rank, _, lane, place = heapq.heappop(heap)
        child = lane.fresh.get(rank)
        if child is None:
            yield rank
        elif passed is None or not passed(child):
            num_pushed += 1
            heapq.heappush(heap, (rank, num_pushed, child.lanes[name], 0))
        if place + 1 < len(lane.members):
            num_pushed += 1
            heapq.heappush(heap, (lane.members[place + 1], num_pushed, lane, place + 1))


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
