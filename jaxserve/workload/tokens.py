"""The tokens of a request's prompt, and the keys of its pages, from its block ids alone.

Knows no model and no tokenizer: a token is any number of the vocabulary. Nothing is kept between
calls; the same request gives the same tokens in every process and on every machine, so that
load client, simulator and a later replay mean the same prompts.

A token is a hash of (seed, block id, place in the block), splitmix64 as Vigna wrote it. A generator
seeded per block was the other way: making one costs more than the 16 tokens it would draw.
"""

from itertools import chain, repeat
from struct import Struct
from typing import Final

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.workload.work import Work

MOST_BLOCK_ID: Final = 2**62 - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_KEY: Final = Struct("<qII").pack
_FIRST: Final = 1
"""Where places begin in a key: block 0 at place 0 would make the key that means "no parent"."""


def draw_tokens(
    work: Work, block_size: int, *, vocab_size: int, first_id: int = 3, seed: int = 0
) -> np.ndarray:
    """The prompt of `work` as token ids [T] int32, each in [first_id, vocab_size).

    Requests share tokens exactly where they share blocks; what follows the blocks is the request's
    own. Another `seed` gives another text throughout: for a second run against a server that
    still has the first one cached. Raises ConfigError for a vocabulary without room.
    """
    span = vocab_size - first_id
    if first_id < 0 or not 1 <= span <= 2**31:
        allowed = f"more than {first_id}, the first id to draw"
        raise ConfigError(f"vocab_size: got {vocab_size}; allowed: {allowed}")
    num_blocks = len(work.blocks)
    shared = min(work.prompt_tokens, num_blocks * block_size)
    ids = np.array((*work.blocks, ~work.number), np.int64).view(np.uint64)
    starts = _mixed(ids ^ _mixed(np.array([seed], np.int64).view(np.uint64)))
    states_T = np.empty(work.prompt_tokens, np.uint64)
    if shared:
        in_blocks = starts[:num_blocks, None] + _steps(block_size)[None, :]
        states_T[:shared] = in_blocks.ravel()[:shared]
    states_T[shared:] = starts[-1:] + _steps(work.prompt_tokens - shared)
    return ((_mixed(states_T) >> 32) * span >> 32).astype(np.int32) + np.int32(first_id)


def _steps(length: int) -> np.ndarray:
    return np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_GOLDEN)


def _mixed(state: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the input moves every bit of the output."""
    state = (state ^ (state >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> 27)) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> 31)


def page_keys_of(
    work: Work, block_size: int, *, page_size: int, scope: int = 0
) -> tuple[bytes, ...]:
    """One key of 16 bytes for each whole page of the prompt, without drawing a token.

    Two requests have equal keys exactly where `prefix_tree.page_keys` of their drawn tokens has
    (up to chance, where a page ends a token or two inside a block). A key is the id of the block
    that holds the page's last token, for ids are chained, and the page's place; a page that reaches
    past the blocks is the request's own. `scope`, 32 bits, numbers who may share: other numbers,
    other keys.
    """
    num_pages = work.prompt_tokens // page_size
    blocks = work.blocks
    num_shared = min(num_pages, len(blocks) * block_size // page_size)
    if num_shared and page_size % block_size == 0:
        step = page_size // block_size
        ids = blocks[step - 1 : num_shared * step : step]
    else:
        lasts = range(page_size - 1, num_shared * page_size, page_size)
        ids = [blocks[last // block_size] for last in lasts]
    own = repeat(~work.number, num_pages - num_shared)
    return tuple(map(_KEY, chain(ids, own), range(_FIRST, _FIRST + num_pages), repeat(scope)))


def own_page_keys(number: int, places: range, *, scope: int = 0) -> list[bytes]:
    """Keys of pages that request `number` alone has, such as those of its output, as `page_keys_of`
    makes them: of the pages at these places, prompt and output together."""
    at = range(_FIRST + places.start, _FIRST + places.stop)
    return list(map(_KEY, repeat(~number, len(places)), at, repeat(scope)))
