"""Waiting prompts depth first: a branch of the cache that more requests wait for comes earlier.

A tree of waiting prompts whose nodes also know how many wait at or below them. A node keeps its
children of which something is cached sorted by that, so that an arrival, an admission or a change
of the cache costs by the depth of the tree, in runs, and not by the number of requests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sortedcontainers import SortedDict

from .waiting_tree import Node, Rank, WaitingTree, members_of


@dataclass(slots=True, eq=False)
class _Branch:
    """What is known of a node. `since` numbers the branches by when somebody began to wait there;
    `cached` maps places to the children with cached pages that are waited for; `place` is where
    the parent has it."""

    since: int
    num_waiting: int = 0
    cached: SortedDict = field(default_factory=SortedDict)
    place: tuple[int, int] | None = None


class WeightedTree(WaitingTree):
    """From the root always into the cached child that most requests wait below, the one that has
    been waited for longer where they are equal; those that end at a node follow, by rank."""

    def __init__(self) -> None:
        super().__init__()
        self._branches: dict[Node, _Branch] = {self._root: _Branch(0)}
        self._num_grown = 0

    def add(self, rank: Rank, keys: Sequence[bytes], num_cached: int, *, lane: str = "") -> None:
        assert not lane, "branches are weighed over all who wait"
        super().add(rank, keys, num_cached)
        self._count(self._place_of[rank][0], 1)

    def remove(self, rank: Rank) -> None:
        self._count(self._place_of[rank][0], -1)
        super().remove(rank)

    def first(self, lane: str = "") -> Rank | None:
        node = self._root
        while self._branches[node].cached:
            node = self._branches[node].cached.peekitem(0)[1]
        return next(members_of(node, lane), None)

    def ranks(self, lane: str = "") -> Iterator[Rank]:
        path = [(self._root, iter(self._branches[self._root].cached.values()))]
        while path:
            node, children = path[-1]
            child = next(children, None)
            if child is None:
                path.pop()
                yield from members_of(node, lane)
            else:
                path.append((child, iter(self._branches[child].cached.values())))

    def _count(self, node: Node | None, change: int) -> None:
        while node is not None:
            self._branches[node].num_waiting += change
            self._place(node)
            node = node.parent

    def _place(self, node: Node) -> None:
        """Bring what the parent knows up to date."""
        branch = self._branches[node]
        wanted = node.cached and branch.num_waiting
        self._move(node, (-branch.num_waiting, branch.since) if wanted else None)

    def _move(self, node: Node, place: tuple[int, int] | None) -> None:
        branch = self._branches[node]
        if node.parent is None or place == branch.place:
            return
        siblings = self._branches[node.parent].cached
        if branch.place is not None:
            del siblings[branch.place]
        if place is not None:
            siblings[place] = node
        branch.place = place

    # What the tree does to its nodes.

    def _set_cached(self, node: Node, cached: int) -> frozenset[str]:
        lanes = super()._set_cached(node, cached)
        self._place(node)
        return lanes

    def _grow(self, parent: Node, run: tuple[bytes, ...], cached: int) -> Node:
        node = super()._grow(parent, run, cached)
        self._num_grown += 1
        self._branches[node] = _Branch(self._num_grown)
        return node

    def _split(self, lower: Node, length: int) -> Node:
        self._move(lower, None)
        upper = super()._split(lower, length)
        branch = self._branches[lower]
        self._branches[upper] = _Branch(branch.since, branch.num_waiting)
        self._place(lower)  # `upper` is, when who forks the run is counted
        return upper

    def _unlink(self, node: Node) -> None:
        super()._unlink(node)
        del self._branches[node]
