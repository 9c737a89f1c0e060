"""What the trees of waiting prompts cost: nodes that stay, keys that are compared."""

import gc

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
