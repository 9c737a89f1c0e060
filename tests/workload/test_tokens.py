"""Tokens follow from block ids, and page keys tell without them what they share."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.schedulers.prefix_tree import NO_PARENT, page_keys
from jaxserve.workload.tokens import MOST_BLOCK_ID, draw_tokens, page_keys_of
from jaxserve.workload.work import Work

VOCABULARY = 1 << 30
"""So large that two draws agree by chance in no test."""
PINNED = [855, 1099, 1604, 1575, 209, 1572, 949, 2043, 1801, 211]


def work(number: int, prompt_tokens: int, blocks: tuple[int, ...] = ()) -> Work:
    return Work(
        number=number,
        arrival_s=0.0,
        prompt_tokens=prompt_tokens,
        output_tokens=1,
        max_tokens=1,
        blocks=blocks,
    )


PATHS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(-11, 36)),
    min_size=2,
    max_size=6,
)
"""Of each prompt: the branches it takes in a tree of blocks, and how far it reaches past them."""


def chained(paths: list[tuple[list[int], int]], block_size: int) -> list[Work]:
    """An id stands for its branch, from the root on."""
    ids: dict[tuple[int, ...], int] = {}
    works = []
    for number, (path, past) in enumerate(paths):
        blocks = tuple(ids.setdefault(tuple(path[: i + 1]), len(ids)) for i in range(len(path)))
        past = max(past, 1 - block_size)  # a last block may be cut short, but not away
        works.append(work(number, max(1, len(blocks) * block_size + past), blocks))
    return works


@given(PATHS, st.integers(1, 12), st.integers(1, 12))
def test_keys_are_equal_exactly_where_keys_of_the_tokens_are(
    paths, block_size: int, page_size: int
) -> None:
    works = chained(paths, block_size)
    ours = [page_keys_of(each, block_size, page_size=page_size) for each in works]
    true = [
        page_keys(
            draw_tokens(each, block_size, vocab_size=VOCABULARY),
            page_size=page_size,
            scope="all",
            model="m",
        )
        for each in works
    ]
    for mine, mine_true in zip(ours, true, strict=True):
        assert len(mine) == len(mine_true)
        for other, other_true in zip(ours, true, strict=True):
            pairs = zip(mine, other, strict=False)
            true_pairs = zip(mine_true, other_true, strict=False)
            assert [a == b for a, b in pairs] == [a == b for a, b in true_pairs]


def test_a_key_tells_place_scope_and_owner_apart() -> None:
    shared = work(0, 64, (0, 1))
    keys = page_keys_of(shared, 32, page_size=16)
    assert len(set(keys)) == 4 and NO_PARENT not in keys
    assert all(len(key) == 16 for key in keys)
    assert not set(keys) & set(page_keys_of(shared, 32, page_size=16, scope=1))
    own = page_keys_of(work(0, 64), 32, page_size=16)
    assert not set(own) & set(page_keys_of(work(1, 64), 32, page_size=16))
    assert page_keys_of(work(0, 16, (MOST_BLOCK_ID,)), 16, page_size=16)


def test_tokens_are_the_same_in_every_process() -> None:
    """Pinned: a recorded run is replayed with the tokens it had."""
    tokens = draw_tokens(work(7, 10, (5,)), 4, vocab_size=2048)
    assert tokens.dtype == np.int32 and tokens.tolist() == PINNED
    code = (
        "from jaxserve.workload.tokens import draw_tokens; from jaxserve.workload.work import Work;"
        "w = Work(number=7, arrival_s=0.0, prompt_tokens=10, output_tokens=1, max_tokens=1,"
        " blocks=(5,)); print(draw_tokens(w, 4, vocab_size=2048).tolist())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(PINNED)


@given(st.integers(4, 300), st.integers(0, 3), st.integers(0, 2**31))
def test_tokens_are_of_the_vocabulary(vocab_size: int, first_id: int, seed: int) -> None:
    tokens = draw_tokens(
        work(3, 500, (1, 2)), 16, vocab_size=vocab_size, first_id=first_id, seed=seed
    )
    assert tokens.shape == (500,)
    assert first_id <= tokens.min() and tokens.max() < vocab_size


def test_another_seed_is_another_text() -> None:
    one, other = (
        draw_tokens(work(0, 100, (1,)), 16, vocab_size=VOCABULARY, seed=seed) for seed in (0, 1)
    )
    assert not (one == other).any()


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size: got 3; allowed: more than 3"):
        draw_tokens(work(0, 1), 0, vocab_size=3)
