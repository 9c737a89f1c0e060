"""Another rate, other lengths, fewer requests, a smaller context."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.workload.generators import generate
from jaxserve.workload.scaling import mean_rate, scaled
from jaxserve.workload.tokens import page_keys_of
from jaxserve.workload.work import Work, Workload

CHAT = generate("chat", ["clients=3"], num_requests=60)


def of(works: Sequence[Work], block_size: int = 0) -> Workload:
    return Workload(
        name="small", requests=lambda: iter(works), num_requests=len(works), block_size=block_size
    )


def one(prompt_tokens: int, output_tokens: int, **more) -> Work:
    lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    return Work(number=0, arrival_s=0.0, max_tokens=output_tokens, **lengths, **more)


def test_nothing_said_changes_nothing() -> None:
    assert scaled(CHAT) is CHAT
    again = scaled(CHAT, rate=CHAT.rate, max_context=10**6)
    assert list(again.requests()) == list(CHAT.requests())


@given(st.floats(0.01, 100.0))
def test_a_rate_moves_arrivals_and_think_times_alike(rate: float) -> None:
    workload = scaled(CHAT, rate=rate)
    factor = CHAT.rate / rate
    assert workload.rate == pytest.approx(rate)
    for before, after in zip(CHAT.requests(), workload.requests(), strict=True):
        assert after.arrival_s == before.arrival_s * factor
        assert after.think_s == (None if before.think_s is None else before.think_s * factor)
        assert replace(after, arrival_s=0.0, think_s=0.0) == replace(
            before, arrival_s=0.0, think_s=0.0
        )


def test_the_rate_of_the_first_requests_is_theirs() -> None:
    """A trace may begin quietly: asked for 2 a second, its first ten come at 2 a second."""
    works = [replace(one(1, 1), number=i, arrival_s=float(i * i)) for i in range(100)]
    workload = replace(of(works), rate=99 / 9801)
    taken = list(scaled(workload, rate=2.0, num_requests=10).requests())
    assert len(taken) == 10
    assert mean_rate([work.arrival_s for work in taken]) == pytest.approx(2.0)


@given(st.sampled_from([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 3.0]))
def test_scaled_lengths_share_what_they_shared(length_scale: float) -> None:
    workload = scaled(CHAT, length_scale=length_scale)
    assert workload.block_size == 16 * length_scale
    size = workload.block_size
    for before, after in zip(CHAT.requests(), workload.requests(), strict=True):
        assert after.prompt_tokens == int(np.ceil(before.prompt_tokens * length_scale))
        assert after.blocks == before.blocks and after.output_tokens >= 1
        assert len(after.blocks) <= -(-after.prompt_tokens // size)
        assert after.prompt_tokens + after.output_tokens <= workload.longest_tokens


@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(2, 100),
    st.integers(0, 300),
)
def test_what_is_cut_fits_and_keeps_its_beginning(
    prompt: int, output: int, context: int, max_tokens: int
) -> None:
    work = one(prompt, output, blocks=tuple(range(-(-prompt // 8))))
    workload = scaled(of([work], 8), max_context=context, cut=True, max_tokens=max_tokens)
    (cut,) = workload.requests()
    assert cut.prompt_tokens >= 1 and cut.output_tokens >= 1
    assert cut.output_tokens <= cut.max_tokens <= context - cut.prompt_tokens
    if prompt + output <= context:
        assert (cut.prompt_tokens, cut.output_tokens) == (prompt, output)
    keys = page_keys_of(cut, 8, page_size=4)
    assert keys == page_keys_of(work, 8, page_size=4)[: len(keys)]
    assert len(cut.blocks) == -(-cut.prompt_tokens // 8)


@given(st.integers(0, 400))
def test_a_stated_limit_covers_the_output(max_tokens: int) -> None:
    for before, after in zip(
        CHAT.requests(), scaled(CHAT, max_tokens=max_tokens).requests(), strict=True
    ):
        assert after.output_tokens == before.output_tokens
        assert after.max_tokens == max(max_tokens, before.output_tokens)


@given(st.integers(10, 3000))
def test_the_first_request_that_is_too_long_is_named(context: int) -> None:
    long = [w for w in CHAT.requests() if w.prompt_tokens + w.output_tokens > context]
    assume(long)
    message = f"chat, request {long[0].number}: got {long[0].prompt_tokens} prompt and"
    with pytest.raises(ConfigError, match=message):
        scaled(CHAT, max_context=context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate: got 0.0; allowed: a positive number"),
        ({"time_scale": float("nan")}, "time_scale: got nan; allowed: a positive number"),
        ({"rate": 1.0, "time_scale": 2.0}, "allowed: one of them"),
        ({"length_scale": 0.3}, "length_scale: got 0.3; .* blocks of 16 tokens whole"),
        ({"length_scale": 1e-12}, "length_scale: got 0"),
        ({"num_requests": 61}, "num_requests: got 61; allowed: 1 to 60, as many as chat has"),
        ({"max_tokens": -1}, "max_tokens: got -1"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaled(CHAT, **settings)


def test_a_rate_needs_arrivals_apart() -> None:
    with pytest.raises(ConfigError, match="rate: got 2.0; allowed: unset, for small has no rate"):
        scaled(of([one(1, 1)]), rate=2.0)


def test_prompts_and_outputs_are_cut_each_to_its_most() -> None:
    works = [one(900, 20, blocks=tuple(range(9))), replace(one(50, 300), max_tokens=400)]
    cut = scaled(of(works, block_size=100), most_prompt=450, most_output=200)
    lengths = [(it.prompt_tokens, it.output_tokens, it.max_tokens) for it in cut.requests()]
    assert lengths == [(450, 20, 20), (50, 200, 200)]
    assert [it.blocks for it in cut.requests()] == [(0, 1, 2, 3, 4), ()]
    assert cut.described == {"prompts cut to": "450 tokens", "outputs cut to": "200 tokens"}
    with pytest.raises(ConfigError, match="most_prompt: got -1; allowed: 0 or more"):
        scaled(of(works), most_prompt=-1)
