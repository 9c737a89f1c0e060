"""What the trees of waiting prompts cost: nodes that stay, keys that are compared."""

import gc
from typing import Any

import pytest

from jaxserve.schedulers.prefix_tree import NO_PARENT, Removed, Stored
from jaxserve.schedulers.prompt_tree import Node, PromptTree
from jaxserve.schedulers.waiting_tree import WaitingTree
from jaxserve.schedulers.weighted_tree import WeightedTree


def num_nodes() -> int:
    return sum(isinstance(each, Node) for each in gc.get_objects())


@pytest.mark.parametrize("make", [WaitingTree, WeightedTree])
def test_who_leaves_takes_its_nodes_along_at_once(make: type[PromptTree]) -> None:
    gc.collect()
    gc.disable()
    try:
        tree, before = make(), num_nodes()
        for number in range(100):
            tree.add((number,), (b"shared", b"%d" % number), 2)
        for number in range(100):
            tree.remove((number,))
        assert num_nodes() == before
    finally:
        gc.enable()


class CountedKey(bytes):
    """A page key that counts how often it is compared."""

    num_compared = 0

    def __eq__(self, other: object) -> bool:
        CountedKey.num_compared += 1
        return bytes.__eq__(self, other)  # type: ignore[arg-type]

    __hash__ = bytes.__hash__


def test_an_eviction_looks_for_one_key_of_each_run() -> None:
    tree = WaitingTree()
    keys = tuple(CountedKey(b"%d" % page) for page in range(300))
    again = tuple(CountedKey(key) for key in keys)
    tree.add((1,), keys, 0)
    tree.on(Stored(1, NO_PARENT, keys))
    CountedKey.num_compared = 0
    tree.on(Removed(2, again[:99:-1]))
    assert tree.match((1,)) == 100
    assert CountedKey.num_compared < 10 * len(keys)


class CountingTree(WaitingTree):
    num_rematched = 0

    def _rematched(self, home: Any, before: int) -> None:
        self.num_rematched += 1
        super()._rematched(home, before)


@pytest.mark.parametrize("is_split", [True, False])
def test_a_prefix_comes_and_goes_in_one_step_also_where_each_had_more_cached(
    is_split: bool,
) -> None:
    """With their own pages gone, those who wait behind one prefix are one crowd again."""
    tree = CountingTree()
    tree.on(Stored(1, NO_PARENT, (b"shared",)))
    for number in range(200):
        keys = (b"shared", b"%d" % number, b"%d.1" % number)
        tree.add((number,), keys, 2 if is_split else 1)
        if not is_split:
            tree.on(Stored(2, keys[0], keys[1:2]))
    for number in range(200):
        tree.on(Removed(3, (b"%d" % number,)))
    assert all(tree.match((number,)) == 1 for number in range(200))
    tree.num_rematched = 0
    tree.on(Removed(4, (b"shared",)))
    tree.on(Stored(5, NO_PARENT, (b"shared",)))
    assert tree.num_rematched < 5
    assert all(tree.match((number,)) == 1 for number in range(200))
    assert list(tree.ranks()) == [(number,) for number in range(200)]
