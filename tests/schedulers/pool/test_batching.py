"""Batches by dynamic programming: the best there are, in time, and the worked example."""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.schedulers.estimators.bilinear import Bilinear, BilinearTime
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.pool.batching import cheapest_cuts, cheapest_mixed_cuts, of_slice
from jaxserve.schedulers.pool.memory_rule import MemoryRule, Unit

EXAMPLE = BilinearTime(Bilinear(1.0, 2.0, 3.0, 10.0), Bilinear(1.0, 1.0, 2.0, 5.0))
STEPS = 4
NO_LIMIT = 10**6

coefficients = st.integers(0, 6).map(float)
models = st.builds(Bilinear, coefficients, coefficients, coefficients, coefficients)
times = st.builds(BilinearTime, models, models)


def rule(capacity: int, unit: Unit = "tokens", page_size: int = 1) -> MemoryRule:
    return MemoryRule(KvMemory(capacity, page_size, 1), unit, NO_LIMIT)


def batches(lengths: Sequence[int], capacity: MemoryRule, cost: Bilinear) -> list[list[int]]:
    ascending = np.sort(np.array(lengths))
    ends = cheapest_cuts(ascending, capacity.rows(ascending, STEPS), cost)
    return [ascending[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]


def total(parts: Sequence[Sequence[int]], cost: Bilinear) -> float:
    return sum(cost.seconds(len(part), max(part)) for part in parts)


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """All ways to part `items` into sets."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for place, part in enumerate(parts):
            yield [*parts[:place], [first, *part], *parts[place + 1 :]]


def ranked(lengths: Sequence[int], capacity: MemoryRule, cost: Bilinear) -> list[float]:
    """Totals of all feasible partitions, the least first, equal ones once."""
    return totals_of(partitions(lengths), capacity, cost)


def totals_of(
    candidates: Iterable[list[list[int]]], capacity: MemoryRule, cost: Bilinear
) -> list[float]:
    feasible = (
        parts
        for parts in candidates
        if all(capacity.fits(len(part), max(part), STEPS) for part in parts)
    )
    return sorted({total(parts, cost) for parts in feasible})


def of_neighbours(lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """All ways to cut `lengths`, sorted, into runs."""
    ascending = sorted(lengths)
    for cuts in range(len(lengths)):
        for places in combinations(range(1, len(lengths)), cuts):
            ends = [*places, len(lengths)]
            yield [ascending[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    ("capacity", "wanted", "seconds", "least", "second"),
    [
        (40, [[2, 3, 4, 5], [12]], [269, 258], 527, 536),
        (10**6, [[2, 3, 4, 5], [12]], [269, 258], 527, 536),
        (32, [[2, 3, 4], [5, 12]], [202, 334], 536, 584),
        (30, [[2], [3, 4, 5], [12]], [98, 228, 258], 584, 590),
        (24, [[2, 3], [4, 5], [12]], [145, 187, 258], 590, 606),
        (16, [[2], [3, 4], [5], [12]], [98, 166, 146, 258], 668, 679),
    ],
)
def test_the_worked_example(
    capacity: int, wanted: list, seconds: list, least: int, second: int
) -> None:
    lengths, cost = [5, 2, 12, 4, 3], of_slice(EXAMPLE, STEPS)
    assert batches(lengths, rule(capacity), cost) == wanted
    assert [cost.seconds(len(part), max(part)) for part in wanted] == seconds
    assert ranked(lengths, rule(capacity), cost)[0] == least
    # The second best of neighbours: of all partitions, {3,4,5} {2,12} comes between at 32.
    assert totals_of(of_neighbours(lengths), rule(capacity), cost)[:2] == [least, second]


def test_the_worked_example_without_batching() -> None:
    cost = of_slice(EXAMPLE, STEPS)
    assert total([[5, 2, 12, 4, 3]], cost) == 562
    assert total([[5], [2], [12], [4], [3]], cost) == 746
    assert total([[2, 3, 4], [5], [12]], cost) == 606  # filled from the shortest at C = 30
    assert not rule(15).fits(1, 12, STEPS) and rule(16).fits(1, 12, STEPS)


@given(rows=st.integers(1, 20), length=st.integers(0, 100), steps=st.integers(1, 30), time=times)
def test_a_slice_is_bilinear(rows: int, length: int, steps: int, time: BilinearTime) -> None:
    assert of_slice(time, steps).seconds(rows, length) == time.slice_s(rows, length, steps)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    time=times,
    capacity=st.integers(16, 90),
    pages=st.booleans(),
)
def test_no_partition_is_better(
    lengths: list[int], time: BilinearTime, capacity: int, pages: bool
) -> None:
    cost = of_slice(time, STEPS)
    memory = rule(capacity // 3, "pages", 3) if pages else rule(capacity)
    if not memory.fits(1, max(lengths), STEPS):
        return
    found = batches(lengths, memory, cost)
    assert sorted(length for part in found for length in part) == sorted(lengths)
    assert all(memory.fits(len(part), max(part), STEPS) for part in found)
    assert total(found, cost) == ranked(lengths, memory, cost)[0]


@pytest.mark.parametrize("seed", range(2))
def test_no_partition_of_eight_is_better(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 30, 8).tolist()
    cost = of_slice(EXAMPLE, STEPS)
    assert total(batches(lengths, rule(90), cost), cost) == ranked(lengths, rule(90), cost)[0]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), time=times)
def test_more_memory_is_never_worse_and_a_fixed_size_never_better(
    lengths: list[int], time: BilinearTime
) -> None:
    cost, ascending = of_slice(time, STEPS), sorted(lengths)
    totals = [total(batches(lengths, rule(capacity), cost), cost) for capacity in (44, 90, 400)]
    assert totals == sorted(totals, reverse=True)
    size = int(rule(90).rows(np.array([ascending[-1]]), STEPS)[0])
    fixed = [ascending[begin : begin + size] for begin in range(0, len(lengths), size)]
    assert totals[1] <= total(fixed, cost)


@given(
    capacity=st.integers(0, 60),
    page_size=st.integers(1, 8),
    length=st.integers(1, 60),
    rows=st.integers(1, 8),
)
def test_the_most_rows_are_those_that_fit(
    capacity: int, page_size: int, length: int, rows: int
) -> None:
    units: tuple[Unit, ...] = ("tokens", "pages")
    for unit in units:
        memory = rule(capacity, unit, page_size)
        most = int(memory.rows(np.array([length]), STEPS)[0])
        assert memory.fits(rows, length, STEPS) == (rows <= most)
        if not memory.fits(rows, length, STEPS):
            assert not memory.fits(rows + 1, length, STEPS)
            assert not memory.fits(rows, length + 1, STEPS)


def test_zeta_and_the_most_rows_bound_a_batch() -> None:
    memory = MemoryRule.share(KvMemory(100, 1, 1), 0.9, "tokens", 3)
    assert memory.fits(1, 86, 4) and not memory.fits(1, 87, 4)
    assert memory.fits(3, 1, 4) and not memory.fits(4, 1, 4)


def test_equal_totals_take_the_smaller_last_batch() -> None:
    fixed_cost = Bilinear(0.0, 1.0, 0.0, 0.0)  # every partition costs the same
    assert batches([1, 2, 3], rule(NO_LIMIT), fixed_cost) == [[1], [2], [3]]


def test_5000_requests_are_planned_in_50_ms() -> None:
    rng = np.random.default_rng(0)
    lengths = np.sort(np.minimum(2048, rng.lognormal(6, 1, 5000)).astype(int))
    cost = of_slice(EXAMPLE, 128)
    most_rows = MemoryRule(KvMemory(54_000, 1, 1), "tokens", 512).rows(lengths, 128)
    took_s = []
    for _ in range(3):
        begin_s = time.perf_counter()
        cheapest_cuts(lengths, most_rows, cost)
        took_s.append(time.perf_counter() - begin_s)
    assert min(took_s) < 0.05


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    fresh=st.lists(st.booleans(), min_size=12, max_size=12),
    time=times,
)
def test_padded_batches_of_new_rows_alone_are_the_base_form(
    lengths: list[int], fresh: list[bool], time: BilinearTime
) -> None:
    ascending = np.sort(np.array(lengths))
    everybody = np.ones(len(lengths), bool)
    ends = cheapest_mixed_cuts(ascending, everybody, time, by_mean=False, most_rows=5, steps=STEPS)
    most_rows = np.full(len(lengths), 5)
    cost = of_slice(time, STEPS)
    parts = [ascending[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]
    base = cheapest_cuts(ascending, most_rows, cost)
    wanted = [ascending[a:b].tolist() for a, b in zip([0, *base], base, strict=False)]
    assert total(parts, cost) == total(wanted, cost)
    some = np.array(fresh[: len(lengths)])
    for by_mean in (False, True):
        ends = cheapest_mixed_cuts(ascending, some, time, by_mean=by_mean, most_rows=5, steps=STEPS)
        sizes = np.diff([0, *ends])
        assert ends[-1] == len(lengths) and sizes.min() >= 1 and sizes.max() <= 5


def test_without_padding_resident_rows_run_together() -> None:
    lengths = np.array([10, 10, 500, 2000])
    nobody = np.zeros(4, bool)
    time = BilinearTime(Bilinear(1e-4, 0.0, 0.0, 0.0), Bilinear(5e-7, 0.0, 0.0, 1e-4))
    cut = {
        by_mean: cheapest_mixed_cuts(lengths, nobody, time, by_mean=by_mean, most_rows=64, steps=8)
        for by_mean in (False, True)
    }
    assert cut[True] == [4] and len(cut[False]) > 1


@given(
    rows=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=6),
    time=times,
    most_rows=st.integers(1, 6),
    falls=st.integers(0, 3),
)
def test_no_runs_of_mixed_rows_are_better(
    rows: list[tuple[int, bool]], time: BilinearTime, most_rows: int, falls: int
) -> None:
    """At mean lengths, also for a prefill that gets a little faster with its length."""
    falling = dataclasses.replace(time.prefill, length=-float(falls))
    time = BilinearTime(falling, time.decode)
    rows = sorted(rows)
    lengths, fresh = (np.array(column) for column in zip(*rows, strict=True))

    def cost(ends: tuple[int, ...]) -> float:
        seconds = 0.0
        for begin, end in itertools.pairwise((0, *ends)):
            part, prefills = lengths[begin:end], lengths[begin:end][fresh[begin:end]]
            seconds += time.decode_s(len(part), 0, STEPS)
            per_row = time.decode_s(len(part), 1, STEPS) - time.decode_s(len(part), 0, STEPS)
            seconds += per_row * part.mean()
            if len(prefills):
                at, once = prefills.mean(), time.prefill.seconds(len(prefills), 0)
                seconds += once + at * (time.prefill.seconds(len(prefills), 1) - once)
        return seconds

    count = len(rows)
    runs = [
        (*inner, count)
        for size in range(count)
        for inner in itertools.combinations(range(1, count), size)
    ]
    allowed = [
        ends for ends in runs if all(b - a <= most_rows for a, b in itertools.pairwise((0, *ends)))
    ]
    found = cheapest_mixed_cuts(
        lengths, fresh, time, by_mean=True, most_rows=most_rows, steps=STEPS
    )
    assert tuple(found) in allowed
    assert cost(tuple(found)) == pytest.approx(min(map(cost, allowed)))
