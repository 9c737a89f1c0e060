"""Every parameter of every order changes a plan somewhere; what lpm and deadline do with theirs.

A parameter that is new and has no case here fails the suite.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.catalog import ORDERS, make_order
from jaxserve.schedulers.events import Admit, Arrive, Enact, Tick
from jaxserve.schedulers.order import Order
from jaxserve.schedulers.order.deadline import Deadline, DeadlineParameters
from jaxserve.schedulers.order.dlpm import DlpmParameters
from jaxserve.schedulers.order.lpm import Lpm, LpmParameters
from jaxserve.schedulers.parameters import read
from jaxserve.schedulers.toy_engine import PAGE, ToyEngine, Work

Plans = list[list[int]]
"""Who is let in, pass by pass."""


def play(
    order: Order,
    turns: Sequence[Sequence[Work]],
    *,
    slots: int = 1,
    room: int = 0,
    cached: Sequence[bytes] = (),
) -> Plans:
    """In each turn requests arrive, a pass lets some in, and a step runs; then on to the end."""
    engine = ToyEngine(order, slots, room=room, cached=set(cached))
    plans: Plans = []
    for turn in [*turns, *[()] * 60]:
        for work in turn:
            engine.arrive(work)
        plans.append(engine.fill())
        engine.step()
    assert not engine.waiting
    return plans


def cold(number: int, client: str, *, pages: int = 1, output: int = 1, **fields) -> Work:
    """A request that shares nothing."""
    return Work(
        number, client, tuple(f"{number}-{page}" for page in range(pages)), output, **fields
    )


# ------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    """Setting a parameter to `value` changes what `plan` gives; `others` are set in both."""

    value: str
    plan: Callable[[Order], object]
    others: tuple[str, ...] = ()


def urgent_work_behind_old(order: Order) -> Plans:
    turns = [[cold(1, "a", output=5)], [cold(2, "a", priority=1)], [], [cold(3, "a")]]
    return play(order, turns)


def a_long_prompt_and_a_late_short_one(order: Order) -> Plans:
    """Nobody's prompt is computed while they wait."""
    long, short = cold(2, "a", pages=3), cold(3, "a", pages=0)
    return play(order, [[cold(1, "a", output=8)], [long], [], [], [], [short]])


def a_long_prompt_does_not_fit(order: Order) -> Plans:
    """It has waited long beside one that takes most of the room when a short one comes."""
    long, short = cold(2, "a", pages=6), cold(3, "a", pages=0)
    return play(order, [[cold(1, "a", output=20)], [long], *[()] * 6, [short]], slots=3, room=40)


def reading_and_writing(order: Order) -> Plans:
    """a has long prompts, b long outputs."""
    b = [cold(number, "b", pages=0, output=10) for number in (2, 3)]
    return play(order, [[cold(1, "a", pages=3), *b, cold(4, "a", pages=3)]])


def cached_and_cold(order: Order) -> Plans:
    """a finds three pages cached, b none of one."""
    keys = (b"x", b"x/x", b"x/x/x")
    a = [Work(number, "a", ("x", "x", "x"), 1) for number in (1, 3)]
    return play(order, [[a[0], cold(2, "b"), a[1], cold(4, "b")]], cached=keys)


def back_from_afar(order: Order) -> Plans:
    return play(order, [[cold(n, "a") for n in range(1, 5)], [], [cold(5, "c"), cold(6, "c")]])


def newcomer_on_an_idle_system(order: Order) -> Plans:
    return play(order, [[cold(1, "a")], [], [cold(2, "b"), cold(3, "a")]])


def hot_and_cold(order: Order) -> Plans:
    """a has eight requests for a cached page, b one for another."""
    hot = [Work(number, "a", ("p",), 1) for number in range(1, 9)]
    return play(order, [[*hot, cold(9, "b")]], cached=(b"p",))


def recomputed(order: Order) -> Plans:
    """a is preempted, its pages are evicted, and then a has a longer match than b."""
    engine = ToyEngine(order, slots=2, cached={b"p"})
    engine.arrive(cold(1, "a", output=20))
    engine.arrive(cold(2, "b", output=20))
    plans = [engine.fill()]
    engine.abort(2)
    engine.preempt()
    engine.evict(b"1-0")
    engine.slots = 1
    plans.append(engine.fill())
    engine.slots = 2
    engine.arrive(Work(3, "a", ("p",), 1))
    engine.arrive(cold(4, "b"))
    return [*plans, engine.fill()]


def one_runs_with_credit(order: Order) -> Plans:
    return play(order, [[cold(1, "a", output=30)], [cold(2, "b")]], slots=2)


def newcomer_with_a_match(order: Order) -> Plans:
    hot = Work(9, "b", ("p",), 1)
    return play(order, [[cold(1, "a"), cold(2, "a")], [hot]], cached=(b"p",))


def victim_of_a_long_prompt(order: Order) -> list[int]:
    """Both run; b's prompt is long, and most of it is still to be run."""
    for number, client, tokens in ((1, "a", 20), (2, "b", 100)):
        order.on(Arrive(number, client, 0, 0.0, tokens, 10, 1))
    for tokens in (20, 100):
        number = order.next()
        assert number is not None
        order.on(Admit(number, tokens))
    order.on(Enact([(1, 20, 0), (2, 10, 0)]))
    return order.running()


def old_and_hot(order: Order) -> Plans:
    """One client: a cold request, and a hot one each turn."""
    hot = [[Work(number, "a", ("p",), 1)] for number in range(2, 20)]
    return play(order, [[cold(1, "a"), *hot[0]], *hot[1:]], cached=(b"p",))


def two_each(order: Order) -> Plans:
    """Matches of 3, 3, 2 and no pages, of clients a, a, b, b."""
    x = ("x", "x", "x")
    works = [Work(1, "a", x, 1), Work(2, "a", x, 1), Work(3, "b", x[:2], 1), cold(4, "b")]
    return play(order, [works], slots=3, cached=(b"x", b"x/x", b"x/x/x"))


def large_before_small(order: Order) -> Plans:
    """Two that do not fit beside who runs, then one that does."""
    large = [cold(number, "a", output=20) for number in (2, 3)]
    return play(order, [[cold(1, "a", output=20)], [*large, cold(4, "a")]], slots=3, room=40)


def family(order: Order) -> Plans:
    """Two share eight pages that are not cached, the third shares nothing."""
    shared = ("x",) * 8
    works = [Work(1, "a", (*shared, "1"), 1), Work(2, "a", (*shared, "2"), 1), cold(3, "a")]
    return play(order, [works], slots=2)


def tight_deadline(order: Order) -> Plans:
    return play(order, [[cold(1, "a", deadline_s=10.0, service_s=15.0), cold(2, "a")]], slots=2)


CASES: dict[tuple[str, str], Case] = {
    ("priority", "age_s"): Case("1", urgent_work_behind_old),
    ("deadline", "service_share"): Case("1", tight_deadline),
    ("larry", "clock"): Case("tokens", a_long_prompt_and_a_late_short_one, ("prefill_s=0",)),
    ("larry", "prefill_s"): Case("0", a_long_prompt_and_a_late_short_one),
    ("larry", "prefill_rate"): Case("1", a_long_prompt_and_a_late_short_one),
    ("larry", "kv_gate"): Case("0.5", a_long_prompt_does_not_fit),
    ("lpm", "in_batch_sharing"): Case("0", family),
    ("vtc", "w_in"): Case("10", reading_and_writing),
    ("vtc", "w_out"): Case("0.5", reading_and_writing),
    ("vtc", "price_cached"): Case("0", cached_and_cold),
    ("vtc", "lift"): Case("false", back_from_afar),
    ("vtc", "idle_lift"): Case("false", newcomer_on_an_idle_system),
    ("dlpm", "quantum"): Case("10", hot_and_cold),
    ("dlpm", "w_in"): Case("50", hot_and_cold, ("quantum=100",)),
    ("dlpm", "w_out"): Case("50", hot_and_cold, ("quantum=100",)),
    ("dlpm", "price_cached"): Case("10", hot_and_cold, ("quantum=100",)),
    ("dlpm", "refill_when"): Case("mid_pass", two_each, ("quantum=1",)),
    ("dlpm", "refill_scope"): Case("queued_or_running", one_runs_with_credit, ("quantum=50",)),
    ("dlpm", "misfit"): Case("skip", large_before_small),
    ("dlpm", "max_skips"): Case("1", large_before_small, ("misfit=skip",)),
    ("dlpm", "new_client_credit"): Case("quantum", newcomer_with_a_match),
    ("dlpm", "charge_at"): Case("enacted", victim_of_a_long_prompt, ("quantum=99",)),
    ("dlpm", "client_age_limit_s"): Case("3", old_and_hot),
    ("dlpm", "recharge_recompute"): Case("true", recomputed, ("quantum=8",)),
}


def parameters() -> set[tuple[str, str]]:
    return {
        (policy.name, field.name)
        for policy in ORDERS.values()
        for field in dataclasses.fields(policy.parameters)
    }


def test_every_parameter_has_a_case() -> None:
    assert set(CASES) == parameters()


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_every_parameter_changes_a_plan(name: str, parameter: str) -> None:
    case = CASES[name, parameter]

    def plan(*options: str) -> object:
        return case.plan(make_order(name, [*case.others, *options], page_size=PAGE))

    assert plan(f"{parameter}={case.value}") != plan()


# ----------------------------------------------------------------------- dlpm: misfits and refills


def test_a_refill_in_mid_pass_goes_on_downwards() -> None:
    """papers.md 3.3: a's second request was passed over when b had credit, and waits."""
    for when, wanted in (("end_of_pass", [[1, 3, 2], [4]]), ("mid_pass", [[1, 3, 4], [2]])):
        order = make_order("dlpm", ["quantum=1", f"refill_when={when}"], page_size=PAGE)
        assert two_each(order)[:2] == wanted


def test_a_pass_goes_past_so_many_misfits_and_no_more() -> None:
    order = make_order("dlpm", ["misfit=skip", "max_skips=3"], page_size=PAGE)
    engine = ToyEngine(order, slots=3, room=40)
    engine.arrive(cold(1, "a", output=20))
    engine.fill()
    for number in range(2, 40):
        engine.arrive(cold(number, f"client-{number}", output=30))
    assert engine.fill() == [] and len(engine.misfits) == 4


def test_nobody_is_refilled_while_a_client_with_credit_does_not_fit() -> None:
    """papers.md 3.3, misfit: b's small requests go past a's large one until b's credit is gone."""
    order = make_order("dlpm", ["quantum=30", "misfit=skip"], page_size=PAGE)
    engine = ToyEngine(order, slots=3, room=40)
    engine.arrive(cold(1, "b", output=25))
    engine.fill()
    engine.arrive(cold(2, "a", output=30))
    number = 2
    while 2 not in engine.admitted:
        number += 1
        engine.arrive(cold(number, "b"))
        engine.fill()
        engine.step()
    # Of b one quantum, what the first request overdrew it by, and one round more.
    assert 5 < number < 60 and engine.charged["b"] <= 2 * (30 + 5 + 2 * 26)


def test_planned_tokens_that_never_run_may_lift_credit_above_the_quantum() -> None:
    """papers.md 3.3: quantum 4, 3 + 3 planned, a refill, nothing run: credit 8."""
    options = ["quantum=4", "refill_when=mid_pass", "charge_at=enacted"]
    order = make_order("dlpm", options, page_size=PAGE)
    for number in (1, 2, 3):
        order.on(Arrive(number, "a", 0, 0.0, 3, 10, 1))
    order.on(Tick(1.0))
    for number in (1, 2):
        assert order.next() == number
        order.on(Admit(number, 3))
    assert order.next() == 3
    assert order.credits() == {"a": 8.0}  # type: ignore[attr-defined]


# ------------------------------------------------------------------------- lpm: sharing in a pass


def test_one_of_a_family_goes_first_and_the_others_find_its_pages() -> None:
    plans = family(Lpm(page_size=PAGE))
    assert plans[:2] == [[1, 3], [2]]


@pytest.mark.parametrize(
    ("page_size", "shared", "deferred"),
    [(16, 2, True), (16, 1, False), (64, 1, True), (24, 1, False), (24, 2, True)],
)
def test_whole_pages_count_and_must_reach_the_threshold(page_size, shared, deferred) -> None:
    order = Lpm(page_size=page_size)
    for number in (1, 2, 3):
        keys = tuple(f"shared-{page}".encode() for page in range(shared)) + (b"%d" % number,)
        order.on(Arrive(number, "a", 0, 0.0, 200, 10, 1, page_keys=keys if number < 3 else ()))
    order.on(Tick(1.0))
    order.on(Admit(1, 200))
    wanted = [3, 2] if deferred else [2, 3]
    assert list(order.waiting()) == wanted and order.next() == wanted[0]
    order.on(Tick(2.0))
    assert list(order.waiting()) == [2, 3] and order.next() == 2


def test_who_finds_more_than_the_threshold_is_not_deferred() -> None:
    order = Lpm(page_size=16)
    keys = tuple(b"%d" % page for page in range(5))
    for number in (1, 2):
        order.on(Arrive(number, "a", 0, 0.0, 200, 10, 1, page_keys=keys, num_cached=3))
    order.on(Arrive(3, "a", 0, 0.0, 200, 10, 1))
    order.on(Admit(1, 152))
    assert order.next() == 2


@given(
    works=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.sampled_from("pqr")), max_size=14
    ),
    cached=st.integers(0, 4),
    threshold=st.integers(0, 12),
    slots=st.integers(1, 6),
)
def test_a_pass_is_lpm_with_the_rest_of_each_family_at_the_end(
    works, cached, threshold, slots
) -> None:
    """papers.md 4.2, request by request. A prompt is some pages of a family and one of its own."""
    order = Lpm(LpmParameters(in_batch_sharing=threshold), page_size=PAGE)
    engine = ToyEngine(order, slots, cached={b"/".join([b"a"] * n) for n in range(1, cached + 1)})
    for number, (name, length, own) in enumerate(works, 1):
        engine.arrive(Work(number, "a", (*(name,) * length, own), 1))
    while engine.waiting:
        queue = sorted(engine.waiting.values(), key=lambda w: (-engine.match(w), w.number))
        first, last, seen = [], [], []
        for work in queue:
            common = [
                sum(ours == theirs for ours, theirs in zip(work.keys, other.keys, strict=False))
                for other in seen
            ]
            is_cold = engine.match(work) < -(-threshold // PAGE)
            if is_cold and any(PAGE * pages >= threshold for pages in common):
                last.append(work.number)
            else:
                first.append(work.number)
                seen += [work] if is_cold else []
        assert engine.fill() == (first + last)[:slots]
        while engine.running:
            engine.step()


# --------------------------------------------------------------------------- deadline: refusals


def asks(deadline_s: float | None, service_s: float = 0.0) -> Arrive:
    return Arrive(1, "a", 0, 5.0, 10, 10, 1, deadline_s=deadline_s, service_s=service_s)


def test_a_deadline_that_cannot_be_met_is_refused() -> None:
    order = Deadline()
    assert order.refuses(asks(None, 100.0)) is None
    assert order.refuses(asks(5.1)) is None and order.refuses(asks(7.0, 3.9)) is None
    why = order.refuses(asks(5.0))
    assert why == (
        "deadline: got 0.000 s from now; allowed: more than 0.000 s from now, for what the request"
        " takes alone"
    )
    assert "got -1.000 s from now" in (order.refuses(asks(4.0)) or "")
    assert "more than 2.000 s" in (order.refuses(asks(6.9, 4.0)) or "")


def test_without_a_share_only_a_passed_deadline_is_refused() -> None:
    order = Deadline(DeadlineParameters(service_share=0.0))
    assert order.refuses(asks(5.1, 1e9)) is None and order.refuses(asks(5.0)) is not None


@pytest.mark.parametrize(
    ("kind", "texts", "fault"),
    [
        (
            DeadlineParameters,
            {"service_share": "-1"},
            "service_share: got -1.0; allowed: 0 or",
        ),
        (LpmParameters, {"in_batch_sharing": "-1"}, "in_batch_sharing: got -1; allowed: 0 or more"),
        (DlpmParameters, {"max_skips": "-1"}, "max_skips: got -1; allowed: 0 or more"),
        (DlpmParameters, {"misfit": "wait"}, "misfit: got 'wait'; allowed: stop, skip"),
        (DlpmParameters, {"refill_when": "never"}, "allowed: end_of_pass, mid_pass"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(kind, texts, fault) -> None:
    with pytest.raises(ValueError, match=fault):
        read(kind, texts)
