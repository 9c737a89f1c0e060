"""Waiting prompts depth first: a branch of the cache that more requests wait for comes earlier.

A tree of waiting prompts whose homes also know how many wait at or below them. A home keeps the
cached ones below it sorted by that, so that an arrival, an admission or a change of the cache costs
by the homes on a way, and not by the number of requests.
"""

import heapq
from collections.abc import Iterator

from .prompt_tree import Home, Node, PromptTree, Rank, cached_alike
from .ranking import Ranking

Place = tuple[int, int]
"""How a branch stands beside others: how many wait, negated, and since when somebody does."""


class _Branch(Home):
    """`members` live here, `num_waiting` here and below; `cached` are those below that are cached
    and waited for; `place` is where the home above has this one."""

    __slots__ = ("cached", "members", "num_waiting", "place")

    def __init__(self, node: Node, above: "_Branch | None"):
        super().__init__(node, above)
        self.members: Ranking[Rank, None] = Ranking()
        self.num_waiting = 0
        self.cached: Ranking[Place, _Branch] = Ranking()
        self.place: Place | None = None


class WeightedTree(PromptTree[_Branch]):
    """From the root always into the cached child that most requests wait below, the one that has
    been waited for longer where they are equal; those that end at a node follow, by rank."""

    def first(self) -> Rank | None:
        """Who comes first."""
        branch = self._root.home
        while branch.cached:
            branch = branch.cached[branch.cached.least()]
        return min((alike.members.least() for alike in _inhabited(branch)), default=None)

    def ranks(self) -> Iterator[Rank]:
        """Everybody, the first one first. A change ends the iteration: ask anew."""
        way = [(self._root.home, self._root.home.cached.ascending())]
        while way:
            branch, places = way[-1]
            place = next(places, None)
            if place is None:
                way.pop()
                yield from heapq.merge(*(alike.members.ascending() for alike in _inhabited(branch)))
            else:
                below = branch.cached[place]
                way.append((below, below.cached.ascending()))

    # What the tree of prompts asks for.

    def _make_home(self, node: Node, above: _Branch | None) -> _Branch:
        return _Branch(node, above)

    def _enter(self, home: _Branch, rank: Rank, lane: str) -> None:
        home.members.put(rank, None)
        self._weigh(home, 1)

    def _leave(self, home: _Branch, rank: Rank, lane: str) -> None:
        del home.members[rank]
        self._weigh(home, -1)

    def _rematched(self, home: _Branch, before: int) -> None:
        self._place(home)

    def _put_below(self, home: _Branch, above: _Branch) -> None:
        self._move(home, None)
        is_new = above.above is home.above
        super()._put_below(home, above)
        if is_new:  # else they count there already
            above.num_waiting += home.num_waiting
        self._place(home)

    def _weigh(self, branch: _Branch, change: int) -> None:
        while branch.above is not None:
            branch.num_waiting += change
            self._place(branch)
            branch = branch.above

    def _place(self, branch: _Branch) -> None:
        """Bring what the home above knows up to date."""
        wanted = branch.node.cached and branch.num_waiting
        self._move(branch, (-branch.num_waiting, branch.node.since) if wanted else None)

    def _move(self, branch: _Branch, place: Place | None) -> None:
        if place == branch.place:
            return
        assert branch.above is not None
        siblings = branch.above.cached
        if branch.place is not None:
            del siblings[branch.place]
        if place is not None:
            siblings.put(place, branch)
        branch.place = place


def _inhabited(branch: _Branch) -> Iterator[_Branch]:
    """Where those live who find what `branch` has cached, and no more."""
    return (alike for alike in cached_alike(branch) if alike.members)
