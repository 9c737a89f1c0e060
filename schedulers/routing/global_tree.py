"""Which replicas are believed to hold which cached pages: one prefix tree for a whole fleet.

Pages are named by the chained keys of `prefix_tree.py`. A page gets a holder when a prompt with it
is sent there, and by the replica's own events, which come late, or not at all: what is believed may
be wrong, and costs a recomputation then.

Ordering (papers.md 3.5): dispatches to a replica are numbered, a page keeps the number of the last
one that brought it there, and an event says how many the replica had received (`seen`). An event
that says a page is gone applies only where the page's number is not larger: what is on its way will
be cached again. Events of one replica come in the order in which it sent them; those of an earlier
life must not be handed on.

A page's holders are the bits of one int, so that a match walks a chain once for all replicas. The
numbers are kept by replica, so that one that leaves costs what it held. The walk takes the holders
of all pages so far: a page whose parent was lost to a dropped event is out of reach until the
parent is stored again.

Size: beyond `max_pages` the least recently used pages go. Whoever uses a page uses those in front
of it just after, so that in the order of use every page stands behind what continues it: a leaf is
first.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from typing import Final

import numpy as np

from ..events import CacheChange
from ..prefix_tree import NO_PARENT, Cleared, Removed, Stored

FEW: Final = 4
"""So many bits are faster one by one than through an array."""


class _Page:
    """Who holds a page, one bit per replica, and the key in front of it."""

    __slots__ = ("holders", "parent")

    def __init__(self, holders: int, parent: bytes):
        self.holders, self.parent = holders, parent


def bits(mask: int) -> Iterator[int]:
    """The places of ones in `mask`, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


class GlobalTree:
    """`num_pages` [R] int64 counts the pages that each replica is believed to hold."""

    def __init__(self, num_replicas: int, *, max_pages: int):
        self._max_pages = max_pages
        self._pages: OrderedDict[bytes, _Page] = OrderedDict()  # least recently used first
        self._numbers: list[dict[bytes, int]] = [{} for _ in range(num_replicas)]  # by replica
        self.num_pages = np.zeros(num_replicas, np.int64)

    def __len__(self) -> int:
        return len(self._pages)

    def held(self, replica: int) -> dict[bytes, int]:
        """The pages that a replica is believed to hold, with the numbers that brought them."""
        return dict(self._numbers[replica])

    def matched(self, keys: Sequence[bytes]) -> np.ndarray:
        """How many leading pages of the chain `keys` each replica holds, [R] int64."""
        matched = np.zeros(len(self._numbers), np.int64)
        pages, depth = self._pages, 0
        holders = (1 << len(self._numbers)) - 1
        for key in keys:
            page = pages.get(key)
            now = 0 if page is None else holders & page.holders
            if now != holders:
                if depth:
                    self._put(matched, holders ^ now, depth)
                holders = now
                if not now:
                    return matched
            depth += 1
        if depth:
            self._put(matched, holders, depth)
        return matched

    def longest(self, keys: Sequence[bytes], among: int) -> tuple[int, int]:
        """Which replicas of `among` hold most leading pages of the chain `keys`, one bit each, and
        how many pages; all of `among` where none holds any."""
        pages, depth = self._pages, 0
        for key in keys:
            page = pages.get(key)
            if page is None or not among & page.holders:
                break
            among &= page.holders
            depth += 1
        return among, depth

    def _put(self, matched: np.ndarray, mask: int, depth: int) -> None:
        if mask.bit_count() <= FEW:
            for replica in bits(mask):
                matched[replica] = depth
            return
        num_replicas = len(matched)
        data = np.frombuffer(mask.to_bytes((num_replicas + 7) // 8, "little"), np.uint8)
        chosen = np.unpackbits(data, count=num_replicas, bitorder="little")
        matched[chosen.view(np.bool_)] = depth

    # What the router tells.

    def sent(self, replica: int, keys: Sequence[bytes], number: int) -> None:
        """A prompt with the chain `keys` went there; dispatch numbers rise."""
        numbers = self._numbers[replica]
        numbers.update(dict.fromkeys(keys, number))
        self._hold(replica, NO_PARENT, keys)

    def changed(self, replica: int, event: CacheChange, seen: int) -> None:
        """The replica's cache changed when it had received `seen` dispatches."""
        numbers = self._numbers[replica]
        match event:
            case Stored(_, parent, keys):
                for key in keys:
                    if numbers.get(key, -1) < seen:
                        numbers[key] = seen
                self._hold(replica, parent, keys)
            case Removed(_, keys):
                self._drop(replica, {key for key in keys if numbers.get(key, seen + 1) <= seen})
            case Cleared():
                self._drop(replica, {key for key, number in numbers.items() if number <= seen})

    def lost(self, replica: int) -> None:
        """The replica is gone; costs what it held."""
        self._drop(replica, set(self._numbers[replica]))

    def joined(self, replica: int) -> None:
        """A fresh replica, in a place that was lost, or in a new one behind the last."""
        if replica == len(self._numbers):
            self._numbers.append({})
            self.num_pages = np.append(self.num_pages, np.int64(0))

    def _hold(self, replica: int, parent: bytes, keys: Sequence[bytes]) -> None:
        """The replica holds `keys`, each the child of the one before, the first of `parent`."""
        pages, bit, before = self._pages, 1 << replica, parent
        for key in keys:
            page = pages.get(key)
            if page is None:
                pages[key] = _Page(bit, before)
            elif not page.holders & bit:
                page.holders |= bit
            before = key
        move_to_end = pages.move_to_end
        for key in reversed(keys):
            move_to_end(key)
        while (page := pages.get(parent)) is not None:
            move_to_end(parent)
            parent = page.parent
        self.num_pages[replica] = len(self._numbers[replica])
        while len(pages) > self._max_pages:
            self._evict()

    def _drop(self, replica: int, keys: Set[bytes]) -> None:
        """The replica holds `keys` no more; it did."""
        pages, numbers, others = self._pages, self._numbers[replica], ~(1 << replica)
        for key in keys:
            del numbers[key]
            page = pages[key]
            page.holders &= others
            if not page.holders:
                del pages[key]
        self.num_pages[replica] = len(numbers)

    def _evict(self) -> None:
        key, page = self._pages.popitem(last=False)
        for replica in bits(page.holders):
            del self._numbers[replica][key]
            self.num_pages[replica] -= 1

    def check(self) -> None:
        """Recount every law; O(pages held). Raises AssertionError."""
        assert len(self._pages) <= self._max_pages
        holders: dict[bytes, int] = {}
        for replica, numbers in enumerate(self._numbers):
            assert self.num_pages[replica] == len(numbers)
            for key in numbers:
                holders[key] = holders.get(key, 0) | 1 << replica
        assert holders == {key: page.holders for key, page in self._pages.items()}
