"""Orders by response ratio, class, deadline and shared prefixes: worked cases, and a plain sort of
everybody beside each of them, whatever happens."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.events import Abort, Admit, Arrive, Enact, Event, Finish, Preempt, Tick
from jaxserve.schedulers.order.base import Order
from jaxserve.schedulers.order.deadline import Deadline
from jaxserve.schedulers.order.dfs_weight import DfsWeight
from jaxserve.schedulers.order.fcfs import Fcfs
from jaxserve.schedulers.order.hrrn import Hrrn
from jaxserve.schedulers.order.larry import Larry, LarryParameters
from jaxserve.schedulers.order.lpm import PrefixOrder
from jaxserve.schedulers.order.priority import Priority, PriorityParameters
from jaxserve.schedulers.order.shortest_prefill_first import ShortestPrefillFirst
from jaxserve.schedulers.parameters import read
from jaxserve.schedulers.prefix_tree import NO_PARENT, Cleared, Removed, Stored
from jaxserve.schedulers.toy_engine import PAGE, ToyEngine, Work
from jaxserve.schedulers.weighted_tree import WeightedTree


def arrive(number: int, arrived_s: float = 0.0, tokens: int = 10, **fields) -> Arrive:
    fields = {"priority": 0, **fields}
    return Arrive(
        number=number,
        client="a",
        arrived_s=arrived_s,
        num_prompt_tokens=tokens,
        max_output=10,
        num_samples=1,
        **fields,
    )


def tell(order: Order, *events: Event) -> None:
    for event in events:
        order.on(event)


# --------------------------------------------------------------------------------- response ratio


@pytest.mark.parametrize("fixed", [0, 50])
def test_larrys_worked_case(fixed) -> None:
    """papers.md 2.3: X waited 2 s for 0.5 s, Y 6 s for 3 s, Z 1 s for 0.1 s; at 1 ms a token, all
    of it for tokens, or 50 ms for none."""
    parameters = LarryParameters(prefill_s=fixed / 1000, prefill_rate=1000.0)
    order = Larry(parameters, page_size=PAGE)
    x, y, z = 2, 1, 3
    tokens = {x: 500 - fixed, y: 3000 - fixed, z: 100 - fixed}
    tell(order, *(arrive(n, at_s, tokens[n]) for n, at_s in ((y, 0.0), (x, 4.0), (z, 5.0))))
    order.on(Tick(6.0))
    assert order.ratios() == {x: 5.0, y: 3.0, z: 11.0}
    assert list(order.waiting()) == [z, x, y] and order.next() == z
    tell(order, *(Admit(n, tokens[n]) for n in (z, x, y)))
    assert order.running() == [z, x, y]  # the smallest ratio gives way first


@pytest.mark.parametrize("clock", ["time", "tokens"])
def test_larry_adds_what_a_prefill_costs_whatever_its_length(clock) -> None:
    """10 ms at 2,000 tokens/s are 20 tokens, on both clocks. A cached prompt costs them too."""
    parameters = LarryParameters(clock=clock, prefill_s=0.01, prefill_rate=2000.0)
    order = Larry(parameters, page_size=PAGE)
    tell(order, arrive(1, tokens=60), Admit(1, 60), arrive(2, tokens=40))
    tell(order, arrive(3, tokens=PAGE, page_keys=(b"x",), num_cached=1))
    tell(order, Enact([(1, 60, 0)]), Tick(0.03))
    assert order.ratios() == {2: 2.0, 3: 4.0}


def test_larry_prefers_small_kv_needs_while_less_than_its_gate_is_free() -> None:
    """A preempted request needs room for what it made, and a cached prompt for all of it."""
    order = Larry(LarryParameters(kv_gate=0.25), page_size=PAGE)
    keys = tuple(b"%d" % page for page in range(3))
    tell(order, arrive(1, 0.0, 6), Admit(1, 6), Enact([(1, 6, 7)]))
    tell(order, arrive(2, 0.0, 20), arrive(3, 0.0, 12, page_keys=keys, num_cached=3))
    tell(order, arrive(4, 7.0, 12), Preempt(1), Tick(8.0, 0.25))
    by_ratio = [3, 1, 2, 4]
    assert list(order.waiting()) == by_ratio and order.next() == 3
    order.on(Tick(8.0, 0.24))
    assert list(order.waiting()) == [3, 4, 1, 2]
    tell(order, arrive(5, 8.0, 5))
    assert list(order.waiting()) == [5, 3, 4, 1, 2] and order.next() == 5
    tell(order, Admit(5, 5), Admit(2, 20))
    assert order.running() == [2, 5]  # by ratio all the same
    order.on(Tick(8.0, 0.3))
    assert list(order.waiting()) == [3, 1, 4] and order.next() == 3


def test_hrrn_counts_the_prompt_tokens_that_were_computed_meanwhile() -> None:
    order = Hrrn(page_size=PAGE)
    tell(order, arrive(1, tokens=10), Admit(1, 10), arrive(2, tokens=40), Enact([(1, 8, 0)]))
    tell(order, arrive(3, tokens=4), Tick(1e6))
    assert order.ratios() == {2: 1.2, 3: 1.0} and order.next() == 2
    tell(order, Enact([(1, 2, 5)]))
    assert order.ratios() == {2: 1.25, 3: 1.5} and order.next() == 3


def test_hrrn_lets_in_first_who_has_nothing_to_compute() -> None:
    order = Hrrn(page_size=PAGE)
    tell(order, arrive(1, tokens=1), arrive(2, tokens=PAGE, page_keys=(b"x",)))
    assert order.next() == 1
    order.on(Stored(1, NO_PARENT, (b"x",)))
    assert order.next() == 2
    order.on(Removed(2, (b"x",)))
    assert order.next() == 1


def test_an_eviction_of_many_pages_leaves_the_match_that_is_above_them() -> None:
    order = Hrrn(page_size=PAGE)
    keys = (b"a", b"ab", b"abc", b"abcd")
    tell(order, arrive(1, tokens=20, page_keys=keys), arrive(2, tokens=20, page_keys=keys[:2]))
    tell(order, arrive(3, tokens=40), Admit(3, 40), Enact([(3, 40, 0)]), Stored(1, NO_PARENT, keys))
    assert order.ratios() == {1: 1 + 40 / (20 - 4 * PAGE), 2: 1 + 40 / (20 - 2 * PAGE)}
    order.on(Removed(2, keys[:0:-1]))
    assert order.ratios() == {1: 1 + 40 / (20 - PAGE), 2: 1 + 40 / (20 - PAGE)}


def test_who_came_after_the_last_tick_has_not_waited() -> None:
    order = Larry(page_size=PAGE)
    tell(order, Tick(1.0), arrive(1, 2.0), arrive(2, 3.0, tokens=90))
    assert order.ratios() == {1: 1.0, 2: 1.0} and order.next() == 1


def test_larry_on_the_token_clock_without_a_fixed_part_is_hrrn() -> None:
    larry = Larry(LarryParameters(clock="tokens", prefill_s=0.0), page_size=PAGE)
    hrrn = Hrrn(page_size=PAGE)
    for order in (larry, hrrn):
        tell(order, arrive(1), Admit(1, 10), arrive(2, tokens=7), Enact([(1, 10, 0)]), Tick(3.0))
    assert larry.ratios() == hrrn.ratios() == {2: 1 + 10 / 7}


def test_what_a_preempted_request_made_is_prompt_and_its_wait_goes_on() -> None:
    order = Hrrn(page_size=PAGE)
    tell(order, arrive(1, tokens=10), Admit(1, 10), Enact([(1, 10, 6)]), Preempt(1))
    assert order.ratios() == {1: 1 + 10 / 16}


@given(
    works=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=30),
    clock=st.sampled_from(["time", "tokens"]),
    prefill_s=st.sampled_from([0.0, 0.004, 0.3]),
)
def test_equal_estimates_make_response_ratio_fcfs(works, clock, prefill_s) -> None:
    def run(order: Order) -> list[int]:
        engine = ToyEngine(order, slots=2)
        for number, (output, pause) in enumerate(works, 1):
            for _ in range(pause):
                engine.fill()
                engine.step()
            engine.arrive(Work(number, "a", (str(number),), output))
        while engine.waiting or engine.running:
            engine.fill()
            engine.step()
        return engine.admitted

    parameters = LarryParameters(clock=clock, prefill_s=prefill_s)
    assert run(Larry(parameters, page_size=PAGE)) == run(Fcfs())


def long_starves(order: Order, *, newcomers: int) -> bool:
    """Whether a long prompt is never let in while three short ones wait, one of them is served a
    step, and `newcomers` more come."""
    engine = ToyEngine(order, slots=1)
    engine.arrive(Work(1, "a", tuple("abcdefghi"), 1))
    number = 1
    for step in range(300):
        for _ in range(newcomers if step else 3):
            number += 1
            engine.arrive(Work(number, "b", (), 1))
        # On a token clock the first to come would go first: nobody has waited.
        engine.admit(2) if not step else engine.fill()
        engine.step()
    return 1 not in engine.admitted


@pytest.mark.parametrize("clock", ["time", "tokens"])
def test_response_ratio_lets_a_long_prompt_in_while_short_ones_wait_a_bounded_time(clock) -> None:
    def order() -> Order:
        return Larry(LarryParameters(clock=clock, prefill_rate=10.0), page_size=PAGE)

    assert not long_starves(order(), newcomers=1)
    assert long_starves(order(), newcomers=2)  # short ones alone are too many: they wait as long
    assert long_starves(ShortestPrefillFirst(page_size=PAGE), newcomers=1)


# ------------------------------------------------------------------------------ class and deadline


def test_an_aged_request_goes_before_a_more_urgent_newcomer() -> None:
    """Two classes apart and 5 s a class: urgent work passes if it comes within 10 s."""
    order = Priority(PriorityParameters(age_s=5.0))
    tell(order, arrive(1, 0.0, priority=2), arrive(2, 9.9), arrive(3, 10.0), arrive(4, 10.1))
    assert list(order.waiting()) == [2, 1, 3, 4]
    tell(order, Admit(2, 10), Admit(1, 10))
    assert order.running() == [2, 1]
    order.on(Preempt(1))
    assert list(order.waiting()) == [1, 3, 4]


def starves(order: Order) -> bool:
    """Whether less urgent work is never let in while urgent work keeps coming, one a second."""
    order.on(arrive(1, 0.0, priority=3))
    for second in range(1, 200):
        order.on(arrive(second + 1, float(second)))
        number = order.next()
        assert number is not None
        if number == 1:
            return False
        tell(order, Admit(number, 10), Finish(number))
    return True


def test_ageing_ends_the_starvation_that_strict_classes_bring() -> None:
    assert starves(Priority())
    assert not starves(Priority(PriorityParameters(age_s=10.0)))


def test_the_earliest_deadline_is_first_and_none_is_last() -> None:
    order = Deadline()
    deadlines = (None, 9.0, 3.0, None, 3.0, -1.0)
    tell(order, *(arrive(n, deadline_s=at) for n, at in enumerate(deadlines, 1)), Tick(5.0))
    assert list(order.waiting()) == [6, 3, 5, 2, 1, 4]
    tell(order, Admit(4, 10), Admit(2, 10), Preempt(4))
    assert list(order.waiting())[-1] == 4 and order.running() == [2]


@pytest.mark.parametrize(
    ("kind", "texts", "fault"),
    [
        (PriorityParameters, {"age_s": "-1"}, "age_s: got -1.0; allowed: 0 or more"),
        (PriorityParameters, {"age_s": "inf"}, "age_s: got inf; allowed: 0 or more"),
        (LarryParameters, {"prefill_rate": "0"}, "prefill_rate: got 0.0; allowed: a positive num"),
        (LarryParameters, {"prefill_s": "-1"}, "prefill_s: got -1.0; allowed: 0 or more"),
        (LarryParameters, {"kv_gate": "1.1"}, r"kv_gate: got 1.1; allowed: a number in \[0, 1\]"),
        (LarryParameters, {"kv_gate": "nan"}, "kv_gate: got nan; allowed"),
        (LarryParameters, {"clock": "sun"}, "clock: got 'sun'; allowed: time, tokens"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(kind, texts, fault) -> None:
    with pytest.raises(ValueError, match=fault):
        read(kind, texts)


# -------------------------------------------------------------------------------- shared prefixes


def wait_for(order: Order, cached: set[bytes], prompts: str) -> None:
    """Requests 1, 2, ... arrive, one a word, each letter a page."""
    for number, letters in enumerate(prompts.split(), 1):
        keys = tuple(letters[: end + 1].encode() for end in range(len(letters)))
        known = sum(key in cached for key in keys)
        order.on(arrive(number, page_keys=keys, num_cached=known))


def test_the_branch_that_most_wait_for_is_followed_to_its_end() -> None:
    """Cached are a, ab, ac and x. Three wait below a, one of them behind ab and one behind ac."""
    order = DfsWeight()
    wait_for(order, {b"a", b"ab", b"ac", b"x"}, "q x xy ad ac ab")
    # Of the equal branches ac was waited for first; q finds nothing.
    assert list(order.waiting()) == [5, 6, 4, 2, 3, 1] and order.next() == 5
    order.on(arrive(7, page_keys=(b"a", b"ab", b"abe"), num_cached=2))
    assert list(order.waiting()) == [6, 7, 5, 4, 2, 3, 1]
    tell(order, Removed(1, (b"ab",)), Admit(4, 10), Admit(5, 10), Admit(6, 10))
    assert list(order.waiting()) == [2, 3, 7, 1] and order.running() == [4, 5, 6]
    order.on(Cleared(2))
    assert list(order.waiting()) == [1, 2, 3, 7]


def test_a_branch_that_forks_has_been_waited_for_as_long_as_before() -> None:
    order = DfsWeight()
    wait_for(order, {b"a", b"ab", b"b"}, "ab b b ac")
    assert list(order.waiting()) == [1, 4, 2, 3]


def test_dfs_weight_with_nothing_cached_is_fcfs_and_keeps_nothing_of_who_left() -> None:
    order = DfsWeight()
    wait_for(order, set(), "b ab abc ac c")
    assert list(order.waiting()) == [1, 2, 3, 4, 5]
    tell(order, *(Abort(number) for number in (3, 1, 5, 4, 2)))
    assert order.next() is None
    assert isinstance(order._tree, WeightedTree)
    assert not order._tree._root.children and not order._tree._root.home.below


# ------------------------------------------------------------------------------ a sort of everybody


@dataclass
class Known:
    """What a plain sort needs to know of a request."""

    event: Arrive
    came_tokens: int
    made: int = 0
    extend: int = 0


@dataclass
class World:
    """Requests and cached pages, told to an order; keys name the whole way to a page."""

    order: Order
    requests: dict[int, Known] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    cached: set[bytes] = field(default_factory=set)
    now_s: int = 0
    free_share: float = 1.0
    computed: int = 0
    num_moves: int = 0
    since: dict[bytes, int] = field(default_factory=dict)
    """The move since which somebody has been waiting for a page."""

    @property
    def waiting(self) -> list[int]:
        return sorted(set(self.requests) - self.running)

    def match(self, keys: tuple[bytes, ...]) -> int:
        return sum(key in self.cached for key in keys)

    def uncached(self, number: int) -> int:
        known = self.requests[number]
        match = self.match(known.event.page_keys)
        return known.event.num_prompt_tokens + known.made - PAGE * match

    def do(self, kind: str, letters: str, pick: int) -> None:
        keys = tuple(letters[: end + 1].encode() for end in range(len(letters)))
        match kind:
            case "arrive":
                number = max(self.requests, default=0) + 1
                event = arrive(
                    number,
                    float(self.now_s),
                    # Now and then a prompt of whole pages, of which nothing may be uncached.
                    PAGE * len(keys) + pick % 3 + (not keys),
                    priority=pick % 5 - 2,
                    page_keys=keys,
                    num_cached=self.match(keys),
                    deadline_s=None if pick % 4 == 0 else float(pick),
                )
                self.requests[number] = Known(event, self.computed)
                self.order.on(event)
            case "admit" if self.waiting:
                number = self.waiting[pick % len(self.waiting)]
                self.requests[number].extend = self.uncached(number)
                self.running.add(number)
                self.order.on(Admit(number, self.requests[number].extend))
            case "preempt" | "enact" | "finish" if self.running:
                number = sorted(self.running)[pick % len(self.running)]
                self.end_or_run(kind, number, pick)
            case "abort" if self.requests:
                number = sorted(self.requests)[pick % len(self.requests)]
                del self.requests[number]
                self.running.discard(number)
                self.order.on(Abort(number))
            case "tick":
                self.now_s += pick
                self.free_share = len(letters) / 5
                self.order.on(Tick(float(self.now_s), self.free_share))
            case "store" if self.match(keys) < len(keys):
                known = self.match(keys)
                self.cached.update(keys)
                self.order.on(Stored(1, keys[known - 1] if known else NO_PARENT, keys[known:]))
            case "evict":
                gone = [key for key in self.cached if key.startswith(letters.encode())]
                self.cached.difference_update(gone)
                gone.sort(key=len, reverse=True)
                self.order.on(Removed(1, tuple(gone)))
            case "clear" if pick == 0:
                self.cached.clear()
                self.order.on(Cleared(1))
            case _:
                pass

    def note_waits(self) -> None:
        self.num_moves += 1
        wanted = {key for n in self.waiting for key in self.requests[n].event.page_keys}
        self.since = {key: self.since.get(key, self.num_moves) for key in wanted}

    def end_or_run(self, kind: str, number: int, pick: int) -> None:
        known = self.requests[number]
        match kind:
            case "preempt":
                self.running.remove(number)
                self.order.on(Preempt(number, self.match(known.event.page_keys)))
            case "enact":
                self.computed += pick
                known.made += pick % 2
                self.order.on(Enact([(number, pick, pick % 2)]))
            case _:
                self.running.remove(number)
                del self.requests[number]
                self.order.on(Finish(number))


MOVES = st.lists(
    st.tuples(
        st.sampled_from(
            ["arrive"] * 5
            + ["admit", "admit", "preempt", "enact", "finish", "abort", "tick"]
            + ["store", "store", "evict", "clear"]
        ),
        # Few ways, so that prompts share them and the cache holds what is waited for.
        st.sampled_from(["", "a", "ab", "abc", "abcd", "abce", "ac", "aca", "b", "babab"]),
        st.integers(0, 12),
    ),
    min_size=20,
    max_size=60,
)

Sort = Callable[[World, int], tuple]


def by_ratio(waited: Callable[[World, Known], int], fixed: Fraction = Fraction(0)) -> Sort:
    def key(world: World, number: int) -> tuple:
        known = world.requests[number]
        uncached = known.extend if number in world.running else world.uncached(number)
        cost = uncached + fixed
        ratio = waited(world, known) / cost if cost else Fraction(10**9)
        return (-ratio, number)

    return key


def by_need_below(gate: float, sort: Sort) -> Sort:
    """Who waits by `sort`, but by need while less than `gate` is free."""

    def key(world: World, number: int) -> tuple:
        if number in world.running or world.free_share >= gate:
            return sort(world, number)
        known = world.requests[number]
        return (known.event.num_prompt_tokens + known.made, number)

    return key


def seconds_by_three(world: World, known: Known) -> int:
    return 3 * int(world.now_s - known.event.arrived_s)


def tokens_since(world: World, known: Known) -> int:
    return world.computed - known.came_tokens


def by_class(age_s: int) -> Sort:
    def key(world: World, number: int) -> tuple:
        event = world.requests[number].event
        if not age_s:
            return (event.priority, number)
        waited_s = world.now_s - event.arrived_s
        return (event.priority - Fraction(waited_s) / age_s, number)

    return key


def by_deadline(world: World, number: int) -> tuple:
    deadline_s = world.requests[number].event.deadline_s
    return (deadline_s is None, deadline_s or 0.0, number)


def depth_first(world: World, way: bytes = b"") -> list[int]:
    """Waiting requests that find `way` cached."""
    keys = {number: world.requests[number].event.page_keys for number in world.waiting}
    below = [number for number in keys if not way or way in keys[number]]
    children = Counter(
        key
        for number in below
        for key in keys[number]
        if key in world.cached and len(key) == len(way) + 1
    )
    branches = sorted(children, key=lambda key: (-children[key], world.since[key]))
    ends = [number for number in below if world.match(keys[number]) == len(way)]
    return [number for key in branches for number in depth_first(world, key)] + ends


def by_depth(world: World, number: int) -> tuple:
    return (number if number in world.running else depth_first(world).index(number),)


class HrrnByTwo(Hrrn):
    """Looks for the two largest ratios at once."""

    num_chosen = 2


class LarryByThree(Larry):
    num_chosen = 3


class CrowdedTree(WeightedTree):
    crowd = 2


class CrowdedDfs(PrefixOrder[WeightedTree]):
    """Depth first where two waiting requests make a home."""

    def __init__(self) -> None:
        super().__init__(CrowdedTree())

    def rank(self, event: Arrive) -> tuple[int]:
        return (event.number,)


ORDERS: dict[str, tuple[Callable[[], Order], Sort]] = {
    "hrrn": (lambda: Hrrn(page_size=PAGE), by_ratio(tokens_since)),
    "hrrn, few at once": (lambda: HrrnByTwo(page_size=PAGE), by_ratio(tokens_since)),
    "larry": (
        lambda: Larry(LarryParameters(prefill_s=0.0, prefill_rate=3.0), page_size=PAGE),
        by_ratio(seconds_by_three),
    ),
    "larry, fixed part, few at once": (
        lambda: LarryByThree(LarryParameters(prefill_s=0.5, prefill_rate=3.0), page_size=PAGE),
        by_ratio(seconds_by_three, Fraction(3, 2)),
    ),
    "larry, gate": (
        lambda: Larry(LarryParameters("time", 0.5, 3.0, kv_gate=0.5), page_size=PAGE),
        by_need_below(0.5, by_ratio(seconds_by_three, Fraction(3, 2))),
    ),
    "larry, tokens, gate, few at once": (
        lambda: LarryByThree(LarryParameters("tokens", 0.5, 3.0, kv_gate=0.7), page_size=PAGE),
        by_need_below(0.7, by_ratio(tokens_since, Fraction(3, 2))),
    ),
    "priority": (Priority, by_class(0)),
    "priority, ageing": (lambda: Priority(PriorityParameters(age_s=4.0)), by_class(4)),
    "deadline": (Deadline, by_deadline),
    "dfs_weight": (DfsWeight, by_depth),
    "dfs_weight, crowded": (CrowdedDfs, by_depth),
}


@pytest.mark.parametrize("name", ORDERS)
@given(moves=MOVES)
def test_everybody_stands_where_a_plain_sort_puts_them(name, moves) -> None:
    make, sort = ORDERS[name]
    world = World(make())
    for move in moves:
        world.do(*move)
        world.note_waits()
        wanted = sorted(world.waiting, key=lambda number: sort(world, number))
        assert list(world.order.waiting()) == wanted
        assert world.order.next() == (wanted[0] if wanted else None)
        wanted = sorted(world.running, key=lambda number: sort(world, number))
        assert world.order.running() == wanted
