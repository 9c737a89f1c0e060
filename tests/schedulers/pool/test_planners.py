"""Pool planners: the worked example's ladder and offload, and each what it says of itself."""

import statistics
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.estimators.bilinear import Bilinear, BilinearTime
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.pool.catalog import make_pool
from jaxserve.schedulers.pool.offload import Loads, max_min
from jaxserve.schedulers.pool.planner import Planner, PoolSetup
from jaxserve.schedulers.pool.request import Batch, PoolRequest, Ran

EXAMPLE = BilinearTime(Bilinear(1.0, 2.0, 3.0, 10.0), Bilinear(1.0, 1.0, 2.0, 5.0))
NOTHING = Bilinear(0.0, 0.0, 0.0, 0.0)
LENGTHS = (5, 2, 12, 4, 3)


def setup_of(capacity: int, *, instances: int = 2, slice_len: int = 4, **changed) -> PoolSetup:
    fields = {"time": EXAMPLE, "memory": KvMemory(capacity, 1, 1), **changed}
    return PoolSetup(instances=instances, slice_len=slice_len, **fields)


def example(*options: str, capacity: int = 32, instances: int = 2) -> Planner:
    """The worked example's pool, zeta 1."""
    setup = setup_of(capacity, instances=instances)
    planner = make_pool("scls", ("zeta=1", *options), setup)
    for number, length in enumerate(LENGTHS):
        planner.arrived(PoolRequest(number, float(number), length, 4))
    return planner


def lengths_of(batch: Batch) -> set[int]:
    return {LENGTHS[number] for number in batch.rows}


def finish(planner: Planner, batch: Batch, *, ended: bool = True, made: int = 4) -> None:
    rows = frozenset(batch.rows)
    what = Ran(made, 1.0, dict.fromkeys(rows, made), rows if ended else frozenset())
    planner.ran(batch, what)


@pytest.mark.parametrize(
    ("step", "wanted", "seconds", "pad"),
    [
        ("so", [{5, 2}, {12, 4}, {3}], 635, 11),
        ("pm", [{2, 3}, {4, 5}, {12}], 590, 2),
        ("ab", [{2, 3, 4}, {5, 12}], 536, 10),
        ("lb", [{2, 3, 4}, {5, 12}], 536, 10),
    ],
)
def test_the_ladder_of_the_worked_example(step: str, wanted: list, seconds: int, pad: int) -> None:
    batches = example(f"step={step}").plan(0.0)
    assert [lengths_of(batch) for batch in batches] == wanted
    assert sum(batch.estimate_s for batch in batches) == seconds
    assert sum(batch.length - length for batch in batches for length in lengths_of(batch)) == pad
    if step != "lb":
        assert [batch.instance for batch in batches] == [0, 1, 0][: len(batches)]


def test_the_offload_of_the_worked_example() -> None:
    planner = example(capacity=30)
    placed = {batch.estimate_s: batch.instance for batch in planner.plan(0.0)}
    assert placed == {258: 0, 228: 1, 98: 1}
    loads = planner.statistics().loads_s
    assert loads == (258, 326) and statistics.pstdev(loads) == 34
    in_turn = example("step=ab", capacity=30)
    in_turn.plan(0.0)
    loads = in_turn.statistics().loads_s
    assert loads == (356, 228) and statistics.pstdev(loads) == 64


def test_the_interval_of_the_worked_example() -> None:
    planner = example("interval_gamma_s=5", capacity=30)
    planner.plan(10.0)
    planner.arrived(PoolRequest(9, 11.0, 3, 4))
    assert planner.due_s(11.0) == 10 + 0.5 * 258
    floor = example("interval_gamma_s=200", capacity=30)
    floor.plan(10.0)
    floor.arrived(PoolRequest(9, 11.0, 3, 4))
    assert floor.due_s(11.0) == 210 and floor.due_s(300.0) == 300


def test_gamma_is_a_slice_of_one_mean_request_unless_given() -> None:
    planner = example("step=ab")
    planner.plan(0.0)
    planner.arrived(PoolRequest(9, 1.0, 3, 4))
    assert planner.due_s(1.0) == EXAMPLE.slice_s(1, round(sum(LENGTHS) / 5), 4)


def test_an_idle_instance_wakes_the_plan() -> None:
    planner = example(capacity=30)
    batches = planner.plan(0.0)
    for batch in batches:
        if batch.instance == 1:
            finish(planner, batch, ended=False, made=2)
    assert planner.due_s(7.0) == 7.0
    assert not any(example("wake=false", capacity=30).plan(0.0)[0].drops)
    assert example("wake=false", capacity=30).due_s(0.0) == 0.0


def test_a_request_that_never_fits_is_refused() -> None:
    planner = example(capacity=16)
    planner.check(PoolRequest(8, 0.0, 12, 4))
    with pytest.raises(
        ValueError, match="request 9: got 12 prompt tokens and 5 to make, for which"
    ):
        planner.check(PoolRequest(9, 0.0, 12, 5))
    static = make_pool("static", ("max_input=8", "max_output=4"), setup_of(40))
    with pytest.raises(ValueError, match="request 9: got 9 prompt tokens; allowed: 8, for which"):
        static.check(PoolRequest(9, 0.0, 9, 4))
    with pytest.raises(
        ValueError, match="max_input: got 8 beside max_output=4, .* allowed: 10 in all"
    ):
        make_pool("static", ("max_input=8", "max_output=4"), setup_of(12))


@pytest.mark.parametrize("pool", ["static", "scls", "scls_resident"])
def test_an_estimate_that_falls_with_length_is_refused(pool: str) -> None:
    falling = BilinearTime(Bilinear(-1.0, 4.0, -2.0, 1.0), NOTHING)
    with pytest.raises(ValueError, match="falls as slices get longer; allowed: one that grows"):
        make_pool(pool, (), setup_of(10**5, slice_len=1, time=falling))


@pytest.mark.parametrize(
    ("pool", "option", "message"),
    [
        ("scl", "", "pool: got 'scl'; allowed: static, scls, scls_resident; did you mean 'scls'"),
        ("scls", "step=xx", "pool_options: step: got 'xx'; allowed: so, pm, ab, lb"),
        ("scls", "zeta=2", "pool_options: zeta: got 2.0; allowed: a number in"),
        ("scls", "batch_size=-1", "pool_options: batch_size: got -1; allowed: 0 or more"),
        ("static", "max_input=0", "pool_options: max_input: got 0; allowed: 1 or more"),
        ("scls_resident", "lookahead=0", "pool_options: lookahead: got 0; allowed: 1 or more"),
        ("scls_resident", "step=so", "pool_options: unknown parameter 'step'"),
    ],
)
def test_bad_options_are_refused(pool: str, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pool(pool, (option,) if option else (), setup_of(100))


def test_sls_fills_batches_for_the_longest() -> None:
    setup = setup_of(100)
    planner = make_pool("static", ("zeta=1", "max_input=12", "max_output=13"), setup)
    for number in range(10):
        planner.arrived(PoolRequest(number, float(number), 1 + number, 13))
    batches = planner.plan(0.0)
    assert [batch.rows for batch in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [batch.instance for batch in batches] == [0, 1, 0]
    assert all(batch.steps == 13 for batch in batches)


@given(
    requests=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=20),
    size=st.integers(1, 4),
)
def test_slices_as_long_as_outputs_are_sls(requests: list[tuple[int, int]], size: int) -> None:
    setup = setup_of(200, slice_len=8)
    options = (f"batch_size={size}", "interval_gamma_s=3")
    static = make_pool("static", ("max_input=12", "max_output=8", *options), setup)
    scls = make_pool("scls", ("step=so", *options), setup)
    plans = []
    for planner in (static, scls):
        for number, (prompt, most) in enumerate(requests):
            planner.arrived(PoolRequest(number, 0.0, prompt, most))
        plan = planner.plan(0.0)
        plans.append([(batch.instance, batch.rows, batch.steps) for batch in plan])
    assert plans[0] == plans[1]


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_on_one_instance_lb_plans_as_ab(lengths: list[int]) -> None:
    plans = []
    for step in ("ab", "lb"):
        planner = make_pool("scls", (f"step={step}",), setup_of(60, instances=1))
        for number, length in enumerate(lengths):
            planner.arrived(PoolRequest(number, 0.0, length, 4))
        plans.append([batch.rows for batch in planner.plan(0.0)])
    assert plans[0] == plans[1]


def test_a_cap_plans_the_oldest() -> None:
    planner = example("most_planned=2", capacity=1000)
    (batch,) = planner.plan(0.0)
    assert set(batch.rows) == {0, 1} and planner.statistics().pooled == 3


def test_estimates_are_refined_by_what_ran() -> None:
    planner = example("refine=true", capacity=1000)
    first, *_ = planner.plan(0.0)
    for _ in range(30):
        planner.ran(first, Ran(4, 2 * first.estimate_s, {}))
        for number in first.rows:
            planner.arrived(PoolRequest(number, 0.0, LENGTHS[number], 4))
        (first, *_) = planner.plan(1000.0)
    assert first.estimate_s > 1.5 * EXAMPLE.slice_s(len(first.rows), first.length, 4)


# ------------------------------------------------------------------------------------- offload


@given(
    batches=st.lists(st.integers(1, 30).map(float), min_size=1, max_size=6),
    instances=st.integers(1, 3),
)
def test_the_makespan_is_within_lpt_bound(batches: list[float], instances: int) -> None:
    def makespan(placed) -> float:
        loads = [0.0] * instances
        for seconds, instance in zip(batches, placed, strict=True):
            loads[instance] += seconds
        return max(loads)

    best = min(map(makespan, product(range(instances), repeat=len(batches))))
    found = makespan(max_min(batches, [0.0] * instances))
    assert found <= (4 / 3 - 1 / (3 * instances)) * best + 1e-9


def test_the_bound_is_met() -> None:
    assert max_min([3.0, 3.0, 2.0, 2.0, 2.0], [0.0, 0.0]) == [0, 1, 0, 1, 0]


@given(estimates=st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=30), order=st.randoms())
def test_what_is_added_is_subtracted_to_the_digit(estimates: list[float], order) -> None:
    loads = Loads(1)
    for estimate_s in estimates:
        loads.add(0, estimate_s)
    assert not loads.idle()
    order.shuffle(estimates)
    for estimate_s in estimates:
        loads.subtract(0, estimate_s)
    assert loads.seconds() == [0.0] and loads.idle() == [0]


# ------------------------------------------------------------------------------------ resident


def resident(*options: str, pages: int = 40, instances: int = 2, time=EXAMPLE) -> Planner:
    setup = setup_of(0, memory=KvMemory(pages, 2, 1), instances=instances, time=time)
    return make_pool("scls_resident", ("zeta=1", *options), setup)


def test_a_resident_request_stays_and_is_not_computed_again() -> None:
    planner = resident()
    planner.arrived(PoolRequest(0, 0.0, 6, 40))
    (first,) = planner.plan(0.0)
    assert first.prefills == {0} and planner.statistics().held_pages == (5, 0)
    finish(planner, first, ended=False)
    assert planner.statistics().held_pages == (5, 0)
    (second,) = planner.plan(1.0)
    assert (second.instance, second.prefills, second.length) == (first.instance, set(), 10)
    assert second.estimate_s == EXAMPLE.decode_s(1, 10, 4)


def test_new_rows_join_residents_at_the_end_of_a_slice() -> None:
    planner = resident(instances=1)
    planner.arrived(PoolRequest(0, 0.0, 6, 40))
    (first,) = planner.plan(0.0)
    planner.arrived(PoolRequest(1, 0.5, 8, 40))
    assert planner.due_s(0.5) is None
    finish(planner, first, ended=False)
    assert planner.due_s(1.0) == 1.0
    (second,) = planner.plan(1.0)
    assert set(second.rows) == {0, 1} and second.prefills == {1} and second.prefill_length == 8


def test_short_pages_are_dropped_by_who_has_not_run_for_longest() -> None:
    planner = resident("lookahead=1", pages=12, instances=1)
    for number in range(2):
        planner.arrived(PoolRequest(number, float(number), 8, 12))
    (first,) = planner.plan(0.0)
    assert set(first.rows) == {0, 1} and planner.statistics().held_pages == (12,)
    finish(planner, first, ended=False)
    (second,) = planner.plan(1.0)  # both would need 8 pages; of two that ran, the newer drops
    assert second.rows == (0,) and second.drops == (1,)
    finish(planner, second, ended=False)
    (third,) = planner.plan(2.0)
    assert third.rows == (0,)
    finish(planner, third)
    (fourth,) = planner.plan(3.0)
    assert fourth.rows == (1,) and fourth.prefills == {1} and fourth.prefill_length == 12
    finish(planner, fourth)
    assert planner.statistics().held_pages == (0,)


def one_resident_behind_another(*options: str, prefill_s: float) -> tuple[Planner, Batch]:
    """Request 0 is resident on instance 1, where the batch of request 1 runs; instance 0 is idle.

    Returns what instance 1 runs too. A prefill takes `prefill_s` a row, and padding is all that
    costs beside it, so that rows of different lengths are kept apart.
    """
    time = BilinearTime(Bilinear(0.0, prefill_s, 0.0, 0.0), Bilinear(1.0, 0.0, 0.0, 0.0))
    planner = resident("lengths=longest", *options, pages=1000, time=time)
    planner.arrived(PoolRequest(2, 0.0, 300, 4))
    (other,) = planner.plan(0.0)
    planner.arrived(PoolRequest(0, 1.0, 4, 400))
    planner.arrived(PoolRequest(1, 1.0, 100, 400))
    short, long = planner.plan(1.0)
    assert (short.rows, long.rows, other.instance, long.instance) == ((0,), (1,), 0, 1)
    finish(planner, short, ended=False)
    finish(planner, other)
    return planner, long


def test_a_resident_request_moves_when_it_is_worth_a_recompute() -> None:
    planner, _ = one_resident_behind_another(prefill_s=1.0)
    (moved,) = planner.plan(2.0)
    assert (moved.rows, moved.prefills, moved.instance) == ((0,), {0}, 0)
    assert planner.statistics().held_pages == (6, 52)


@pytest.mark.parametrize(
    ("option", "prefill_s"), [("move_gain=1", 1e4), ("move_gain=1e9", 1.0), ("most_moves=0", 1.0)]
)
def test_it_stays_when_it_is_not(option: str, prefill_s: float) -> None:
    planner, long = one_resident_behind_another(option, prefill_s=prefill_s)
    assert not planner.plan(2.0) and planner.due_s(2.0) is None
    finish(planner, long)
    (stayed,) = planner.plan(3.0)
    assert (stayed.rows, stayed.prefills, stayed.instance) == ((0,), set(), 1)
