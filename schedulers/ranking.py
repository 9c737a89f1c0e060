"""A dictionary whose keys are also sorted, for queues: who comes mostly joins the end, who leaves
mostly stands in front.

A plain list of keys stays sorted. What is deleted stays in the list until it comes up, or until it
is most of the list: a deletion costs what a dictionary's does, an insertion at the end an append,
one elsewhere a binary search and a `memmove`. With ten thousand keys that is a fifth of what a
balanced structure written in Python costs, and still less with a hundred thousand.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MOST_DEAD: Final = 64
"""Deleted keys that may stay, beside as many as there are others."""


class Ranking(dict[Key, Value]):
    """Values by key, the smallest key first. Insert with `put`; delete as from any dictionary."""

    __slots__ = ("_keys", "_most", "_start")

    def __init__(self) -> None:
        super().__init__()
        self._keys: list[Any] = []
        self._start = 0  # nobody before it is alive
        self._most = MOST_DEAD  # keys, before the dead are left out

    @classmethod
    def of(cls, values: Mapping[Key, Value]) -> "Ranking[Key, Value]":
        """All of `values`, whose keys ascend."""
        ranking: Ranking[Key, Value] = cls()
        ranking.update(values)
        ranking._keys = list(values)
        return ranking

    def put(self, key: Key, value: Value) -> None:
        """Let `value` stand at `key`."""
        keys = self._keys
        if len(keys) >= self._most:
            keys = self._keys = [key for key in keys[self._start :] if key in self]
            self._start, self._most = 0, 2 * len(keys) + MOST_DEAD
        if not keys or keys[-1] < key:
            keys.append(key)
        else:
            place = bisect_left(keys, key, self._start)
            if keys[place] != key:
                keys.insert(place, key)
        self[key] = value

    def least(self) -> Key:
        """The smallest key. Raises IndexError where there is none."""
        keys, start = self._keys, self._start
        while keys[start] not in self:
            start += 1
        self._start = start
        return keys[start]

    def ascending(self) -> Iterator[Key]:
        """All keys, the smallest first. A change ends the iteration: ask anew."""
        keys = self._keys
        for place in range(self._start, len(keys)):
            if keys[place] in self:
                yield keys[place]
