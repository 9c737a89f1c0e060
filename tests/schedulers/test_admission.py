"""Who fits: the worked cases, and laws that hold for every rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.admission import (
    Admission,
    Candidate,
    Memory,
    Peak,
    Ratio,
    Running,
    RunningRows,
    SliceLease,
)
from jaxserve.schedulers.catalog import ADMISSIONS, make_admission
from jaxserve.schedulers.peak_memory import PeakMemory


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


def peak_pages(rows: list[tuple[int, int]], page_size: int) -> int:
    peak = PeakMemory(page_size)
    peak.join([held for held, _ in rows], [left for _, left in rows])
    return peak.pages()


def plain_peak(rows: list[tuple[int, int]], page_size: int) -> int:
    """The formula as it is published, with pages for tokens."""
    rows = sorted(rows, key=lambda row: -row[1])
    sums = [0]
    for k, (_, steps) in enumerate(rows):
        if k + 1 == len(rows) or rows[k + 1][1] != steps:  # ends that tie count all that tie
            sums.append(sum(-(-(held + steps) // page_size) for held, _ in rows[: k + 1]))
    return max(sums)


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


def test_the_published_worked_case_of_peak_but_for_its_strictness() -> None:
    """papers.md 2.8: 25 tokens at most, and published is peak < capacity: 26 admits, 25 does not.
    Here what fits exactly is admitted. Reserving all would need 32."""
    rows = [(3, 7), (10, 4), (6, 2)]  # by what is left, longest first
    held = [sum(tokens for tokens, _ in rows[: k + 1]) for k in range(3)]
    assert [held[k] + (k + 1) * rows[k][1] for k in range(3)] == [10, 21, 25]
    assert plain_peak(rows, 1) == peak_pages(rows, 1) == 25
    new = Candidate(num_tokens=3, cost_pages=3, max_output=7, num_samples=1)
    for name, least in (("peak", 25), ("reserve_max", 32)):
        running = RunningRows([Running(10, 10, 4), Running(6, 6, 2)])
        rule = make_admission(name)
        assert rule.admits(new, running, memory(total=least))
        assert not rule.admits(new, running, memory(total=least - 1))


def test_peak_admits_up_to_the_pool() -> None:
    running = [Running(10, 10, 4), Running(6, 6, 2)]
    new = Candidate(num_tokens=3, cost_pages=3, max_output=7, num_samples=1)
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
    assert peak == plain_peak(rows, page_size)
    assert peak_pages([*rows, (1, 1)], page_size) >= peak


@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), max_size=8),
    cut=st.integers(0, 8),
    held=st.integers(1, 40),
    remaining=st.integers(0, 30),
    copies=st.integers(1, 3),
    page_size=st.sampled_from([1, 4, 16]),
)
def test_peak_is_the_same_however_rows_join(
    rows, cut: int, held: int, remaining: int, copies: int, page_size: int
) -> None:
    peak = PeakMemory(page_size)
    for part in (rows[:cut], rows[cut:]):
        peak.join([row[0] for row in part], [row[1] for row in part])
    assert peak.pages() == plain_peak(rows, page_size)
    more = [*rows, *[(held, remaining)] * copies]
    assert peak.pages_with(held, remaining, copies) == plain_peak(more, page_size)
    assert peak.pages() == plain_peak(rows, page_size)  # asking changed nothing


@pytest.mark.parametrize("name", ADMISSIONS)
def test_an_empty_pool_admits_what_fits_and_a_small_one_does_not(name: str) -> None:
    assert make_admission(name).admits(candidate(10, output=5), RunningRows(), memory(total=100))
    assert not make_admission(name).admits(
        candidate(101, output=5), RunningRows(), memory(total=100)
    )


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
    rule = make_admission(name)
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


@given(data=st.data())
def test_slice_lease_answers_as_if_it_always_looked_at_all_rows(data) -> None:
    """Where there is room for any rows it does not look at them."""
    some = st.tuples(st.integers(1, 40), st.integers(0, 40), st.booleans())
    rows = []
    for held, left, lags in data.draw(st.lists(some, max_size=4)):
        rows.append(Running(held, (held - 1) // 8 if lags else -(-held // 8), left))
    steps, available = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 40))
    growths = [-(-(row.held + min(2 * steps, row.remaining)) // 8) for row in rows]
    growth = sum(max(0, pages - row.leased_pages) for pages, row in zip(growths, rows, strict=True))
    running = RunningRows(rows[:1])
    running.extend(iter(rows[1:]), len(rows[1:]))
    assert len(running) == len(rows)
    new = candidate(8, output=100, page_size=8)
    need = 1 + -(-2 * steps // 8) + growth
    room = memory(total=100, available=available, page_size=8, steps=steps)
    assert SliceLease().admits(new, running, room) == (need <= available)
    assert list(running) == rows


def test_samples_share_whole_prompt_pages_only() -> None:
    # 12 tokens on pages of 8: one whole page shared, each sample its own partial page; 4 + 4
    # tokens ahead fill that page, so 1 + 3 pages in all.
    three = candidate(12, output=4, page_size=8, samples=3)
    assert SliceLease().admits(three, RunningRows(), memory(total=4, page_size=8, steps=4))
    assert not SliceLease().admits(three, RunningRows(), memory(total=3, page_size=8, steps=4))


def test_the_last_page_of_a_prompt_is_shared_by_no_samples() -> None:
    # Each sample runs the last of the 16 tokens itself, on a copy of the second page.
    three = candidate(16, output=8, page_size=8, samples=3)
    for name in ("slice_lease", "reserve_remaining"):
        rule = make_admission(name)
        fits, misfits = (memory(total=pages, page_size=8) for pages in (7, 6))
        assert rule.admits(three, RunningRows(), fits)
        assert not rule.admits(three, RunningRows(), misfits)


def test_samples_that_do_not_fork_pay_for_their_own_prompts() -> None:
    two = Candidate(num_tokens=12, cost_pages=4, max_output=4, num_samples=2, forks=False)
    assert SliceLease().admits(two, RunningRows(), memory(total=4, page_size=8))
    assert not SliceLease().admits(two, RunningRows(), memory(total=3, page_size=8))


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
                make_admission(name).admits(candidate(t, output=o), RunningRows(), memory(total=m))
                for t, o, m in cases
            ]
            for _ in range(2)
        )
        assert first == second


@pytest.mark.parametrize(
    ("option", "rho", "admitted"),
    [("start=0.5", 0.07, True), ("floor=0.5", 0.35, False), ("decay_steps=1200", 0.399, False)],
)
def test_how_ratio_falls_and_whom_it_lets_in_is_up_to_its_parameters(
    option: str, rho: float, admitted: bool
) -> None:
    """Beside a row with 1000 tokens left, of which 98 are reserved by default."""
    running = RunningRows([Running(held=10, leased_pages=10, remaining=1000)])
    default, rule = make_admission("ratio"), make_admission("ratio", [option])
    assert isinstance(rule, Ratio)
    for each in (default, rule):
        each.ticked(600)
    assert rule.rho == pytest.approx(rho)
    pool = memory(total=90 if admitted else 200)
    assert rule.admits(candidate(1, output=1), running, pool) == admitted
    assert default.admits(candidate(1, output=1), running, pool) != admitted


def test_ratio_counts_no_more_of_an_output_than_its_clip() -> None:
    running = [Running(held=10, leased_pages=10, remaining=1000)]
    for clip, admitted in ((100, True), (1000, False)):
        rule = make_admission("ratio", [f"clip={clip}"])
        assert rule.admits(candidate(1, output=1), RunningRows(running), memory(total=300)) == (
            admitted
        )


def room(rule: Admission, client: str = "a", *, made: int = 0, total: int = 100) -> int:
    """Rows of `made` tokens of at most 50 beside a first one, page size 1."""
    new = Candidate(1 + made, 1 + made, 50 - made, 1, client, made)
    running = RunningRows([Running(1 + made, 1 + made, 50 - made, made, client)])
    while rule.admits(new, running, memory(total=total)):
        running.extend([Running(1 + made, 1 + made, 50 - made, made, client)], 1)
    return len(running)


def taught(*options: str, **outputs: list[int]) -> Admission:
    rule = make_admission("past_future", options)
    for client, lengths in outputs.items():
        for length in lengths:
            rule.finished(client, length)
    return rule


def test_past_future_is_peak_while_nothing_is_known() -> None:
    assert room(taught()) == room(make_admission("peak")) == 1
    assert room(taught("expect=9")) == 10
    assert room(taught("expect=9"), made=8, total=110) == 11
    assert room(taught("expect=9"), made=9, total=110) == 2  # all 9 are made: up to 50, then


def test_past_future_takes_the_clients_own_history_and_else_everybodys() -> None:
    rule = taught(a=[9] * 16, b=[19] * 16)
    assert room(rule, "a") == 10 and room(rule, "b") == 5
    assert room(rule, "c") == 5  # quantile 0.7 of both
    assert room(taught("min_samples=17", a=[9] * 16, b=[19] * 16), "a") == 5


def test_past_future_expects_longer_outputs_of_who_has_made_much() -> None:
    lengths = [9] * 8 + [24] * 8
    rule = taught("u=0.5", a=lengths)
    assert room(rule) == 10
    assert room(rule, made=9) == 4  # only the 24s are longer
    assert room(rule, made=24, total=110) == 2  # nobody is: it may go on to 50


def test_every_parameter_of_past_future_changes_whom_it_lets_in() -> None:
    lengths = [4] * 8 + [9] * 8 + [24] * 16
    assert room(taught(a=lengths)) == 4
    assert room(taught("u=0.5", a=lengths)) == 10
    assert room(taught("u=0.2", a=lengths)) == 20
    assert room(taught("hist=16", a=lengths[::-1])) == 10
    assert room(taught("slack=9", "u=0.5", a=lengths)) == 5


def test_a_history_too_short_for_its_samples_is_refused() -> None:
    fault = "min_samples: got 16; allowed: hist=8 at most"
    with pytest.raises(ValueError, match=fault):
        make_admission("past_future", ["hist=8"])


def test_past_future_forgets_the_client_it_heard_of_longest_ago() -> None:
    rule = taught(**{"a": [9] * 16, "b": [19] * 16, "c": [19] * 16})
    for i in range(998):
        rule.finished(f"passer-by {i}", 24)
    assert room(rule, "b") == 5 and room(rule, "a") == 4


@pytest.mark.parametrize("name", ["ratio", "past_future"])
def test_rules_that_guess_let_in_who_is_alone(name: str) -> None:
    rule = make_admission(name)
    assert rule.admits(candidate(10, output=500), RunningRows(), memory(total=11))
    assert not rule.admits(candidate(10, output=500), RunningRows(), memory(total=10))
