"""A histogram keeps every value, whoever counts them and wherever it is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.histogram import Histogram

BOUNDS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12, unique=True).map(sorted)
VALUES = st.lists(st.tuples(st.floats(-2e6, 2e6), st.integers(0, 50)), max_size=40)


def filled(bounds, values) -> Histogram:
    histogram = Histogram(bounds)
    for value, count in values:
        histogram.observe(value, count)
    return histogram


@given(bounds=BOUNDS, values=VALUES)
def test_each_bound_has_the_values_up_to_it(bounds, values):
    histogram = filled(bounds, values)
    for bound, total in histogram.cumulative():
        assert total == sum(count for value, count in values if value <= bound)
    assert histogram.count == sum(count for _, count in values)
    assert histogram.sum == pytest.approx(sum(value * count for value, count in values), abs=1e-3)


@given(bounds=BOUNDS, values=VALUES)
def test_a_count_is_as_many_observations(bounds, values):
    one_by_one = filled(bounds, [(value, 1) for value, count in values for _ in range(count)])
    at_once = filled(bounds, values)
    assert at_once.counts == one_by_one.counts
    assert at_once.sum == pytest.approx(one_by_one.sum, abs=1e-3)


@given(bounds=BOUNDS, values=VALUES, others=st.dictionaries(st.text(max_size=5), st.floats()))
def test_it_comes_back_from_plain_numbers(bounds, values, others):
    histogram = filled(bounds, values)
    neighbour = filled([1.0], [(2.0, 3)])
    flat = {**others, **histogram.flat("steps"), **neighbour.flat("slice_steps")}
    back = Histogram.from_flat("steps", flat)
    assert back is not None
    assert (back.bounds, back.counts, back.sum) == (
        histogram.bounds,
        histogram.counts,
        histogram.sum,
    )
    assert Histogram.from_flat("seconds", flat) is None


def test_a_copy_stays_as_it_is():
    histogram = Histogram((1.0, 2.0))
    copy = histogram.copy()
    histogram.observe(1.5)
    assert (copy.count, histogram.count) == (0, 1)


@pytest.mark.parametrize(
    "bounds", [(), (1.0, 1.0), (2.0, 1.0), (1.0, float("inf")), (float("nan"),)]
)
def test_bounds_that_do_not_grow_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds: got"):
        Histogram(bounds)
