"""The tree of waiting prompts against a plain list of them, whatever happens to the cache."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.schedulers.prefix_tree import NO_PARENT, Cleared, Removed, Stored
from jaxserve.schedulers.waiting_tree import WaitingTree, longest_match

LETTERS = st.lists(st.sampled_from("ab"), max_size=5)


def key_chain(letters: list[str]) -> tuple[bytes, ...]:
    """Keys that name the whole way, as hashed ones do."""
    return tuple("".join(letters[: place + 1]).encode() for place in range(len(letters)))


class WaitingPrompts(RuleBasedStateMachine):
    """Requests come and go; pages are cached parents first and evicted children first."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = WaitingTree()
        self.waiting: dict[tuple[int], tuple[bytes, ...]] = {}
        self.cached: set[bytes] = set()
        self.last = 0

    def match(self, keys: tuple[bytes, ...]) -> int:
        return sum(key in self.cached for key in keys)

    @rule(letters=LETTERS)
    def arrive(self, letters: list[str]) -> None:
        self.last += 1
        keys = key_chain(letters)
        self.tree.add((self.last,), keys, self.match(keys))
        self.waiting[(self.last,)] = keys

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[rank]
        self.tree.remove(rank)

    @rule(letters=LETTERS)
    def store(self, letters: list[str]) -> None:
        keys = key_chain(letters)
        known = self.match(keys)
        if known < len(keys):
            parent = keys[known - 1] if known else NO_PARENT
            self.cached.update(keys)
            self.tree.on(Stored(1, parent, keys[known:]))

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        top = data.draw(st.sampled_from(sorted(self.cached)))
        gone = sorted((key for key in self.cached if key.startswith(top)), key=len, reverse=True)
        self.cached.difference_update(gone)
        self.tree.on(Removed(1, tuple(gone)))

    @rule()
    def clear(self) -> None:
        self.cached.clear()
        self.tree.on(Cleared(1))

    @invariant()
    def the_tree_is_the_list_sorted(self) -> None:
        wanted = sorted(
            self.waiting, key=lambda rank: longest_match(self.match(self.waiting[rank]), rank)
        )
        assert list(self.tree) == wanted
        assert len(self.tree) == len(wanted)
        assert self.tree.first() == (wanted[0] if wanted else None)
        for rank, keys in self.waiting.items():
            assert self.tree.match(rank) == self.match(keys)

    @invariant()
    def nothing_is_left_of_who_left(self) -> None:
        if not self.waiting:
            assert not self.tree._root.children and not self.tree._at and not self.tree._groups


TestWaitingPrompts = WaitingPrompts.TestCase
