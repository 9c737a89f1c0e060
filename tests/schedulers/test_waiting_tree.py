"""The tree of waiting prompts against a plain list of them, whatever happens to the cache."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.schedulers.prefix_tree import NO_PARENT, Cleared, Removed, Stored
from jaxserve.schedulers.waiting_tree import WaitingTree, longest_match

LANES = ("p", "q")
LETTERS = st.lists(st.sampled_from("ab"), max_size=5)


def key_chain(letters: list[str]) -> tuple[bytes, ...]:
    """Keys that name the whole way, as hashed ones do."""
    return tuple("".join(letters[: place + 1]).encode() for place in range(len(letters)))


class WaitingPrompts(RuleBasedStateMachine):
    """Requests come and go; pages are cached parents first and evicted children first."""

    make_tree = WaitingTree
    asks_always = True

    def __init__(self) -> None:
        super().__init__()
        self.tree = self.make_tree()
        self.waiting: dict[tuple[int], tuple[bytes, ...]] = {}
        self.lane: dict[tuple[int], str] = {}
        self.cached: set[bytes] = set()
        self.last = 0
        self.told_match: dict[tuple[int], int] = {}

    def match(self, keys: tuple[bytes, ...]) -> int:
        return sum(key in self.cached for key in keys)

    @rule(letters=LETTERS, lane=st.sampled_from(LANES))
    def arrive(self, letters: list[str], lane: str) -> None:
        self.last += 1
        keys, rank = key_chain(letters), (self.last,)
        self.tree.add(rank, keys, self.match(keys), lane=lane)
        self.waiting[rank], self.lane[rank] = keys, lane

    def told(self, change: Stored | Removed | Cleared) -> None:
        self.tree.on(change)
        if self.asks_always:
            self.ask_for_lanes()

    @rule()
    def ask_for_lanes(self) -> None:
        """Lanes of all whose match is another than when they were last asked for are told."""
        now = self.matches()
        told = set(self.tree.changed_lanes())
        for rank, match in self.told_match.items():
            assert now.get(rank, match) == match or self.lane[rank] in told
        self.told_match = now

    def matches(self) -> dict[tuple[int], int]:
        return {rank: self.match(keys) for rank, keys in self.waiting.items()}

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
            self.told(Stored(1, parent, keys[known:]))

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        top = data.draw(st.sampled_from(sorted(self.cached)))
        gone = sorted((key for key in self.cached if key.startswith(top)), key=len, reverse=True)
        self.cached.difference_update(gone)
        self.told(Removed(1, tuple(gone)))

    @rule()
    def clear(self) -> None:
        self.cached.clear()
        self.told(Cleared(1))

    @invariant()
    def the_tree_is_the_list_sorted(self) -> None:
        if self.asks_always:
            self.ask()

    @rule()
    def ask(self) -> None:
        match = self.matches()
        for lane in LANES:
            ranks = [rank for rank in self.waiting if self.lane[rank] == lane]
            wanted = sorted(ranks, key=lambda rank: longest_match(match[rank], rank))
            assert list(self.tree.ranks(lane)) == wanted
            assert self.tree.first(lane) == (wanted[0] if wanted else None)
        assert len(self.tree) == len(self.waiting)
        for rank, keys in self.waiting.items():
            assert self.tree.match(rank) == self.match(keys)

    @invariant()
    def nothing_is_left_of_who_left(self) -> None:
        if not self.waiting:
            assert not self.tree._root.children and not self.tree._at and not self.tree._homes
            assert not self.tree._root.home.below


class TwoAreACrowd(WaitingTree):
    crowd = 2


class CrowdedPrompts(WaitingPrompts):
    make_tree = TwoAreACrowd


class SeldomAskedPrompts(CrowdedPrompts):
    """Nobody asks after each change: prefixes go and come back, and requests move in between."""

    asks_always = False


TestWaitingPrompts = WaitingPrompts.TestCase
TestCrowdedPrompts = CrowdedPrompts.TestCase
TestSeldomAskedPrompts = SeldomAskedPrompts.TestCase


@given(prompts=st.lists(LETTERS, max_size=12), cached=LETTERS, passed=LETTERS)
def test_who_stands_first_beside_a_branch(
    prompts: list[list[str]], cached: list[str], passed: list[str]
) -> None:
    tree = WaitingTree()
    held = set(key_chain(cached))
    way = key_chain(passed)
    for number, letters in enumerate(prompts):
        keys = key_chain(letters)
        tree.add((number,), keys, sum(key in held for key in keys))
    left = [rank for rank in tree.ranks() if not way or way[-1] not in key_chain(prompts[rank[0]])]
    for _ in range(2):  # the second time the branch is a home
        first = tree.first_beside(lambda node: bool(way) and way[-1] in node.run)
        assert first == (left[0] if left else None)
    assert list(tree.ranks()) == sorted(
        ((number,) for number in range(len(prompts))),
        key=lambda rank: longest_match(tree.match(rank), rank),
    )


def test_a_prefix_that_comes_and_goes_before_anybody_asks_leaves_all_where_they_were() -> None:
    tree = WaitingTree()
    tree.add((1,), (), 0)
    tree.add((2,), (b"x",), 0)
    tree.on(Stored(1, NO_PARENT, (b"x",)))
    tree.on(Removed(2, (b"x",)))
    assert tree.first() == (1,) and list(tree.ranks()) == [(1,), (2,)]


def test_a_lane_whose_requests_moved_between_two_changes_is_told() -> None:
    tree = WaitingTree()
    tree.add((1,), (b"x",), 0, lane="p")
    tree.add((2,), (b"x", b"y"), 0, lane="q")
    tree.changed_lanes()
    tree.on(Stored(1, NO_PARENT, (b"x",)))
    tree.on(Stored(2, b"x", (b"y",)))
    tree.on(Removed(3, (b"y",)))
    assert set(tree.changed_lanes()) == {"p", "q"}


def test_a_lane_whose_requests_moved_to_a_crowds_home_is_told_too() -> None:
    tree = TwoAreACrowd()
    tree.add((1,), (b"x",), 0, lane="p")
    tree.add((2,), (b"x", b"y"), 0, lane="q")
    tree.changed_lanes()
    tree.on(Stored(1, NO_PARENT, (b"x",)))
    tree.add((3,), (b"x", b"y"), 1, lane="r")
    assert {"p", "q"} <= set(tree.changed_lanes())
