"""Waiting requests by the longest cached prefix, or by another rule of match and rank.

Requests wait in *lanes*, one per client for orders that ask client by client. Each home of the tree
of prompts keeps those who live in it, lane by lane, sorted by rank; and a lane's homes are sorted
by what the rule makes of their match and their least rank. Homes whose match has changed are sorted
in anew when somebody asks: by then the prefix may be back. Knows ranks. Knows no policy.

Most requests of a server that keeps up are let in at once. So who comes to an empty lane stays out
of the tree: it stands first wherever its prompt would hang. It is put in when another one comes to
its lane, when the cache changes, or when somebody asks for a whole lane.
"""

import heapq
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .events import CacheChange
from .prompt_tree import Home, Node, PromptTree, Rank, way_up
from .ranking import Ranking

GroupKey = Callable[[int, Rank], tuple[Any, ...]]
"""How a home stands beside others: by its match in pages and its least rank; smallest first."""


def longest_match(match: int, least: Rank) -> tuple[Any, ...]:
    """Longest match first, then by rank."""
    return (-match, *least)


class _Lane(Ranking[Rank, None]):
    """One lane's requests in a home; the lane has the home at `key`, because of `first`."""

    __slots__ = ("first", "key")

    def __init__(self) -> None:
        super().__init__()
        self.first: Rank | None = None
        self.key: tuple[Any, ...] | None = None


class _Home(Home):
    __slots__ = ("lanes",)

    def __init__(self, node: Node, above: "_Home | None"):
        super().__init__(node, above)
        self.lanes: dict[str, _Lane] = {}


@dataclass(slots=True)
class _Single:
    """A request that is alone in its lane, and not in the tree: what `add` was told of it."""

    rank: Rank
    keys: Sequence[bytes]
    num_cached: int
    lane: str


class WaitingTree(PromptTree[_Home]):
    """A tree of waiting prompts that knows who stands first, and in what sequence the others do."""

    def __init__(self, group_key: GroupKey = longest_match):
        self._group_key = group_key
        self._homes: dict[str, Ranking[tuple[Any, ...], _Home]] = {}  # by lane
        self._sorted_by: dict[_Home, int] = {}  # the match, of homes that may have another now
        self._changed: dict[str, None] = {}  # lanes, since somebody asked
        self._singles: dict[Rank, _Single] = {}
        self._single_of: dict[str, _Single] = {}  # by lane
        super().__init__()

    # Requests.

    def __len__(self) -> int:
        return super().__len__() + len(self._singles)

    def add(self, rank: Rank, keys: Sequence[bytes], num_cached: int, *, lane: str = "") -> None:
        if lane in self._single_of or lane in self._homes:
            self._put_in()
            super().add(rank, keys, num_cached, lane=lane)
        else:
            single = _Single(rank, keys, num_cached, lane)
            self._singles[rank] = self._single_of[lane] = single

    def remove(self, rank: Rank) -> None:
        single = self._singles.pop(rank, None)
        if single is None:
            super().remove(rank)
        else:
            del self._single_of[single.lane]

    def match(self, rank: Rank) -> int:
        single = self._singles.get(rank)
        return super().match(rank) if single is None else single.num_cached

    def on(self, change: CacheChange) -> None:
        if self._singles:
            self._put_in()
        super().on(change)

    def _put_in(self) -> None:
        """Those who were alone in their lanes join the tree, in the sequence in which they came."""
        singles, self._singles = self._singles, {}
        self._single_of.clear()
        for each in singles.values():
            super().add(each.rank, each.keys, each.num_cached, lane=each.lane)

    # The sequence.

    def first(self, lane: str = "") -> Rank | None:
        """Who stands first in a lane."""
        single = self._single_of.get(lane)
        if single is not None:
            return single.rank
        if self._sorted_by:
            self._sort_anew()
        homes = self._homes.get(lane)
        return homes[homes.least()].lanes[lane].first if homes else None

    def first_key(self, lane: str) -> tuple[Any, ...]:
        """How the first one stands in a lane where somebody waits."""
        single = self._single_of.get(lane)
        if single is not None:
            return self._group_key(single.num_cached, single.rank)
        if self._sorted_by:
            self._sort_anew()
        return self._homes[lane].least()

    def first_beside(self, passed: Callable[[Node], bool], lane: str = "") -> Rank | None:
        """Who stands first in a lane, leaving out all at and below nodes that are `passed`.

        Such a node is made a home, so that from then on it is passed in one step.
        """
        self._put_in()
        self._sort_anew()
        homes = self._homes.get(lane, Ranking())
        for key in homes.ascending():
            home = homes[key]
            rank = home.lanes[lane].first
            branches = [node for node in way_up(self._node_of[rank]) if passed(node)]
            if not branches:
                return rank
            if branches[-1].home is home and branches[-1] is not home.node:
                self._make_home_of(branches[-1])
                return self.first_beside(passed, lane)
        return None

    def changed_lanes(self) -> Collection[str]:
        """Lanes of requests whose match has changed since this was last asked."""
        if self._sorted_by:
            self._sort_anew()
        if not self._changed:
            return ()
        changed, self._changed = self._changed, {}
        return changed

    def ranks(self, lane: str = "") -> Iterator[Rank]:
        """A lane, the first one first. A change ends the iteration: ask anew."""
        self._put_in()
        self._sort_anew()
        homes = self._homes.get(lane, Ranking())
        keys = homes.ascending()
        upcoming = next(keys, None)
        # (key, tie-break, rank, match, the others who live there)
        heap: list[Any] = []
        while upcoming is not None or heap:
            while upcoming is not None and (not heap or upcoming <= heap[0][0]):
                home = homes[upcoming]
                others = home.lanes[lane].ascending()
                heapq.heappush(heap, (upcoming, len(heap), next(others), home.match, others))
                upcoming = next(keys, None)
            key, number, rank, match, others = heap[0]
            yield rank
            if upcoming is None and len(heap) == 1:
                yield from others
                return
            following = next(others, None)
            if following is None:
                heapq.heappop(heap)
            else:
                key = self._group_key(match, following)
                heapq.heapreplace(heap, (key, number, following, match, others))

    # What the tree of prompts asks for.

    def _make_home(self, node: Node, above: _Home | None) -> _Home:
        home = _Home(node, above)
        if above in self._sorted_by:  # which those who move in were sorted by, too
            self._sorted_by[home] = self._sorted_by[above]
        return home

    def _enter(self, home: _Home, rank: Rank, lane: str) -> None:
        ranking = home.lanes.get(lane)
        if ranking is None:
            ranking = home.lanes[lane] = _Lane()
        ranking.put(rank, None)
        if ranking.first is None or rank < ranking.first:
            self._sort_in(home, lane, ranking)

    def _leave(self, home: _Home, rank: Rank, lane: str) -> None:
        ranking = home.lanes[lane]
        del ranking[rank]
        if rank == ranking.first:
            self._sort_in(home, lane, ranking)

    def _rematched(self, home: _Home, before: int) -> None:
        self._sorted_by.setdefault(home, before)

    def _moving_up(self, home: _Home) -> None:
        self._changed.update(dict.fromkeys(home.lanes))

    def _unmake_home(self, home: _Home) -> None:
        self._sorted_by.pop(home, None)

    def _sort_anew(self) -> None:
        """Sort in anew the homes whose match has changed."""
        for home, match in self._sorted_by.items():
            if home.match != match:
                self._changed.update(dict.fromkeys(home.lanes))
            for name, lane in home.lanes.items():
                # One that was made meanwhile may be sorted by a match that is gone again.
                if lane.key != self._group_key(home.match, lane.first):
                    self._sort_in(home, name, lane)
        self._sorted_by.clear()

    def _sort_in(self, home: _Home, name: str, lane: _Lane) -> None:
        """Bring up to date where `lane` has `home`."""
        homes = self._homes.get(name)
        if homes is None:
            homes = self._homes[name] = Ranking()
        if lane.key is not None:
            del homes[lane.key]
        if lane:
            lane.first = lane.least()
            lane.key = self._group_key(home.match, lane.first)
            homes.put(lane.key, home)
        else:
            del home.lanes[name]
            if not homes:
                del self._homes[name]
