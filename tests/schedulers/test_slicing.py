"""How long: when a slice is long, when it is short, and what bounds it."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.catalog import make_slicing
from jaxserve.schedulers.estimators.serving_time import ServingTime, SliceShape
from jaxserve.schedulers.slicing import (
    Adaptive,
    Fixed,
    SliceBounds,
    SliceLength,
    SlicingView,
    WholeSequence,
    least_loss,
)

STEP_S, ROW_S, FIXED_S, PROMPT_S = 5e-3, 1e-3, 5e-4, 1e-4


def seconds(shape: SliceShape) -> float:
    step_s = STEP_S + ROW_S * math.log1p(shape.rows)
    return FIXED_S + shape.steps * step_s + PROMPT_S * shape.prefill_tokens


def view(rows: int, *, now_s: float = 0.0, remaining: int = 500, **changes) -> SlicingView:
    fields = dict(
        now_s=now_s,
        remaining=[remaining] * rows,
        context_tokens=100 * rows,
        prefill_tokens=0,
        backlog=False,
        cut_prompts=False,
    )
    return SlicingView(**{**fields, **changes})


def bounds(
    *,
    slice_steps: int = 64,
    max_gap_s: float = 0.0,
    overlap: bool = True,
    dispatch_s: float = FIXED_S,
) -> SliceBounds:
    return SliceBounds(
        slice_steps, max_context=512, max_gap_s=max_gap_s, overlap=overlap, dispatch_s=dispatch_s
    )


def learned(*, max_gap_s: float = 0.0, overlap: bool = True, hazard: float = 0.01) -> Adaptive:
    slicing = Adaptive(bounds(max_gap_s=max_gap_s, overlap=overlap))
    for i in range(300):
        shape = SliceShape(1 + i % 16, 1 + (7 * i) % 64, 1000 * (i % 13), 32 * (i % 5))
        ran(slicing, shape, hazard=hazard)
    return slicing


def ran(slicing, shape: SliceShape, *, host_s: float = 2e-3, hazard: float = 0.01) -> None:
    """A slice in which no row was padding and all made a token at each step."""
    made = shape.steps * shape.rows
    finished = round(hazard * made)
    slicing.ran(shape, slice_s=seconds(shape), host_s=host_s, made=made, finished=finished)


def test_nothing_waits_and_nobody_comes_so_slices_are_long() -> None:
    choice = learned().choose(view(32))
    assert choice.steps == 64 and choice.depth == 2


def test_a_backlog_makes_slices_short_and_gives_them_a_quorum() -> None:
    slicing = learned()
    idle, busy = slicing.choose(view(32)), slicing.choose(view(32, backlog=True))
    assert busy.steps < idle.steps
    assert 1 <= busy.quorum < 32


def test_frequent_arrivals_make_slices_short() -> None:
    slicing = learned()
    for i in range(200):
        slicing.arrived(i * 0.02)
    assert slicing.choose(view(32, now_s=4.0)).steps < 32
    # and long again once they stop
    assert slicing.choose(view(32, now_s=1e6)).steps == 64


def test_cut_prompts_ask_for_the_next_slice_at_once() -> None:
    assert learned().choose(view(8, cut_prompts=True)).steps == 1


def test_dearer_hosts_ask_for_longer_slices() -> None:
    cheap, dear = learned(overlap=False), learned(overlap=False)
    for _ in range(100):
        shape = SliceShape(8, 32, 0, 0)
        ran(dear, shape, host_s=50e-3)
        ran(cheap, shape, host_s=1e-3)
    waiting = view(32, backlog=True)
    assert dear.choose(waiting).steps > cheap.choose(waiting).steps


@pytest.mark.parametrize("overlap", [False, True])
def test_the_gap_bounds_what_is_in_flight(overlap: bool) -> None:
    slicing = learned(max_gap_s=0.1, overlap=overlap)
    choice = slicing.choose(view(32))
    predicted = seconds(SliceShape(choice.steps, 32, 0, 0)) * choice.depth
    assert predicted <= 0.1 * 1.05
    assert choice.steps > 1


def test_no_slice_is_longer_than_its_longest_row() -> None:
    assert learned().choose(view(4, remaining=3)).steps == 3


def test_fixed_and_sequence_do_not_look() -> None:
    assert Fixed(16, depth=2).choose(view(3)).steps == 16
    whole = WholeSequence(512)
    assert whole.choose(view(3, remaining=77)).steps == 77
    assert not whole.admits_while_running


def test_serving_time_learns_its_own_form() -> None:
    time = ServingTime(FIXED_S)
    shapes = [
        SliceShape(1 + i % 16, 1 + (5 * i) % 64, 500 * (i % 17), 32 * (i % 7)) for i in range(400)
    ]

    def truth(shape: SliceShape) -> float:
        return seconds(shape) + 2e-7 * shape.attended_tokens

    for shape in shapes:
        time.observe(shape, truth(shape))
    unseen = SliceShape(32, 48, 40_000, 96)
    assert time.predict_s(unseen) == pytest.approx(truth(unseen), rel=0.02)


def test_the_gap_also_bounds_slices_that_prompts_cut() -> None:
    prompts = view(8, cut_prompts=True, prefill_tokens=512)
    for max_gap_s, depth in ((0.0, 2), (1.0, 2), (0.01, 1)):
        assert learned(max_gap_s=max_gap_s).choose(prompts) == SliceLength(1, 8, depth)


def test_padding_rows_do_not_hide_how_often_rows_end() -> None:
    """A bucket of 8 rows that holds one makes one token a step, not eight."""
    lone, full = Adaptive(bounds(overlap=False)), Adaptive(bounds(overlap=False))
    shape = SliceShape(10, 8, 0, 0)
    for slicing, made, finished in ((lone, 10, 1), (full, 80, 8)):
        for _ in range(200):
            slicing.ran(shape, slice_s=seconds(shape), host_s=2e-3, made=made, finished=finished)
    waiting = view(8, backlog=True)
    assert lone.choose(waiting) == full.choose(waiting)


def chosen(*options: str, after=lambda slicing: None, **changes) -> SliceLength:
    slicing = make_slicing("adaptive", options, bounds=bounds(slice_steps=512, overlap=False))
    after(slicing)
    return slicing.choose(view(32, **changes))


def arrivals(slicing) -> None:
    for place in range(20):
        slicing.arrived(place * 1.0)
    slicing.arrived(19.05)


def rare_ends(slicing) -> None:
    for _ in range(20):
        ran(slicing, SliceShape(16, 32, 0, 0), hazard=0.002)


def slower_device(slicing) -> None:
    for place in range(400):
        slow, made = 1 + 9 * (place >= 200), 8 * (1 + place % 32)
        shape = SliceShape(8, 1 + place % 32, 100 * (place % 7), 0)
        slice_s = slow * seconds(shape)
        slicing.ran(shape, slice_s=slice_s, host_s=2e-3, made=made, finished=made // 64)


@pytest.mark.parametrize(
    ("shorter", "longer", "after", "changes"),
    [
        ("host_s=0.001", "host_s=0.1", lambda slicing: None, {"backlog": True}),
        ("hazard=0.1", "hazard=0.001", lambda slicing: None, {"backlog": True}),
        ("prior_tokens=1000000", "prior_tokens=1", rare_ends, {"backlog": True}),
        ("memory=0.99", "memory=0.5", rare_ends, {"backlog": True}),
        ("arrival_memory=0.1", "arrival_memory=0.9", arrivals, {"now_s": 19.06}),
        ("forgetting=0.9", "forgetting=1.0", slower_device, {"backlog": True}),
    ],
)
def test_every_parameter_of_adaptive_changes_the_plan(shorter, longer, after, changes) -> None:
    short, long = (chosen(option, after=after, **changes) for option in (shorter, longer))
    assert short.steps < long.steps


def test_slice_steps_is_the_most_of_adaptive() -> None:
    for slice_steps in (8, 64):
        assert Adaptive(bounds(slice_steps=slice_steps)).choose(view(4)).steps == slice_steps


@given(
    fixed=st.floats(1e-2, 10),
    rows=st.integers(1, 256),
    events=st.floats(1e-4, 10),
    waits=st.sampled_from([1, 3]),
    at_least=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_no_other_length_loses_much_less(fixed, rows, events, waits, at_least) -> None:
    def loss(steps: float) -> float:
        return fixed * rows / steps + waits * events * steps / 2

    steps, least = least_loss(fixed, rows, events, waits=waits, at_least=at_least)
    assert steps >= at_least and least == pytest.approx(loss(steps))
    others = [1e-3 * 1.1**i for i in range(200)]
    assert least <= (1 + 1e-9) * min(loss(other) for other in others if other >= at_least)


def test_dear_dispatches_ask_for_longer_slices() -> None:
    cheap, dear = (Adaptive(bounds(dispatch_s=dispatch_s)) for dispatch_s in (1e-3, 1e-2))
    for slicing in (cheap, dear):
        for i in range(20):
            slicing.arrived(i * 0.02)
    assert dear.choose(view(32, now_s=0.4)).steps > cheap.choose(view(32, now_s=0.4)).steps


def test_slices_that_scatter_and_all_have_prompts_do_not_make_lengths_scatter() -> None:
    """As under load, where they do not tell what a dispatch costs and what a step with prompts."""
    rng, chosen_steps = random.Random(0), set()
    slicing = Adaptive(bounds())
    for i in range(1000):
        slicing.arrived(2.0 * i)
        shape = SliceShape(4 + i % 8, 32, 3200 * (3 + i % 8), 128 * (1 + i % 3))
        slice_s = seconds(shape) * rng.uniform(0.85, 1.15)
        slicing.ran(shape, slice_s=slice_s, host_s=2e-3, made=200, finished=2)
        if i >= 200:
            chosen_steps.add(slicing.choose(view(32, now_s=2.0 * i)).steps)
    assert max(chosen_steps) <= 1.2 * min(chosen_steps)


def test_a_dispatch_takes_time() -> None:
    with pytest.raises(ValueError, match=r"dispatch_s: got 0.0; allowed: "):
        bounds(dispatch_s=0.0)
