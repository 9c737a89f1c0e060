"""Who fits: the worked cases, and laws that hold for every rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.admission import (
    ADMISSIONS,
    Candidate,
    Memory,
    Peak,
    Ratio,
    Running,
    RunningRows,
    SliceLease,
    peak_pages,
)


def memory(*, total: int, available: int | None = None, page_size: int = 1, steps: int = 4):
    return Memory(
        page_size=page_size,
        total_pages=total,
        available_pages=total if available is None else available,
        watermark_pages=0,
        slice_steps=steps,
    )


def candidate(tokens: int, *, output: int, page_size: int = 1, samples: int = 1) -> Candidate:
    return Candidate(tokens, -(-tokens // page_size), output, samples)


def simulate_peak(rows: list[tuple[int, int]], page_size: int) -> int:
    """Pages held at once when every row makes a token a step until it has made its own."""
    most = 0
    for step in range(1, max(remaining for _, remaining in rows) + 1):
        alive = [held + step for held, remaining in rows if remaining >= step]
        most = max(most, sum(-(-tokens // page_size) for tokens in alive))
    return most


def test_peak_worked_example() -> None:
    a, b, c = (10, 4), (6, 2), (3, 7)
    assert peak_pages([a, b], 1) == 20
    assert peak_pages([a, b, c], 1) == 25
    assert peak_pages([a, b, c], 4) == 7
    assert peak_pages([(1, 10), (1, 9), (5, 1)], 1) == 20


def test_peak_admits_up_to_the_pool() -> None:
    running = [Running(10, 10, 4), Running(6, 6, 2)]
    new = Candidate(num_tokens=2, cost_pages=2, max_output=8, num_samples=1)  # 3 used, 7 remain
    assert Peak().admits(new, RunningRows(running), memory(total=25))
    assert not Peak().admits(new, RunningRows(running), memory(total=24))


@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 4, 16]),
)
def test_peak_equals_step_by_step_simulation(rows, page_size: int) -> None:
    peak = peak_pages(rows, page_size)
    assert peak == simulate_peak(rows, page_size)
    assert peak <= sum(-(-(held + left) // page_size) for held, left in rows)
    assert peak_pages([*rows, (1, 1)], page_size) >= peak


@pytest.mark.parametrize("name", ADMISSIONS)
def test_an_empty_pool_admits_what_fits_and_a_small_one_does_not(name: str) -> None:
    assert ADMISSIONS[name]().admits(candidate(10, output=5), RunningRows(), memory(total=100))
    assert not ADMISSIONS[name]().admits(candidate(101, output=5), RunningRows(), memory(total=100))


@pytest.mark.parametrize("name", ADMISSIONS)
@given(data=st.data())
def test_more_memory_never_refuses_what_less_admits(name: str, data) -> None:
    held = data.draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=5))
    running = [Running(tokens, -(-tokens // 8), left) for tokens, left in held]
    new = candidate(
        data.draw(st.integers(1, 60)), output=data.draw(st.integers(1, 60)), page_size=8
    )
    leased = sum(row.leased_pages for row in running)
    total = leased + data.draw(st.integers(0, 40))
    small = memory(total=total, available=total - leased, page_size=8)
    large = memory(total=total + 5, available=total + 5 - leased, page_size=8)
    rule = ADMISSIONS[name]()
    if rule.admits(new, RunningRows(running), small):
        assert rule.admits(new, RunningRows(running), large)


def test_slice_lease_counts_two_slices_ahead_for_everyone() -> None:
    running = [Running(held=8, leased_pages=1, remaining=100)]  # 16 more tokens: 2 more pages
    new = candidate(8, output=100, page_size=8)  # its page, and 2 more ahead
    exact = memory(total=6, available=5, page_size=8, steps=8)
    assert SliceLease().admits(new, RunningRows(running), exact)
    assert not SliceLease().admits(
        new, RunningRows(running), memory(total=6, available=4, page_size=8, steps=8)
    )


def test_samples_share_whole_prompt_pages_only() -> None:
    # 12 tokens on pages of 8: one whole page shared, each sample its own partial page; 4 + 4
    # tokens ahead fill that page, so 1 + 3 pages in all.
    three = candidate(12, output=4, page_size=8, samples=3)
    assert SliceLease().admits(three, RunningRows(), memory(total=4, page_size=8, steps=4))
    assert not SliceLease().admits(three, RunningRows(), memory(total=3, page_size=8, steps=4))


def test_ratio_falls_with_steps_and_rises_after_a_retraction() -> None:
    rule = Ratio()
    rule.ticked(600)
    assert rule.rho == pytest.approx(0.7 * 0.14)
    rule.ticked(600)
    assert rule.rho == pytest.approx(0.7 * 0.14)
    rule.retracted(RunningRows([Running(50, 1, 70, made=30), Running(12, 1, 90, made=10)]))
    assert rule.rho == pytest.approx((40 + 2 * 20) / (200 + 1))


def test_rules_are_deterministic() -> None:
    rng = np.random.default_rng(0)
    cases = [
        (int(rng.integers(1, 50)), int(rng.integers(1, 50)), int(rng.integers(1, 100)))
        for _ in range(50)
    ]
    for name in ADMISSIONS:
        first, second = (
            [
                ADMISSIONS[name]().admits(candidate(t, output=o), RunningRows(), memory(total=m))
                for t, o, m in cases
            ]
            for _ in range(2)
        )
        assert first == second
