"""The requests every engine is measured on: one seed, one list, lengths fixed in advance.

Knows numpy and nothing of engines. All requests are there at time 0 and are served first come,
first served; every output has exactly its forced length, so all engines make the same tokens'
worth of work, whatever the tokens are.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

MAX_ROWS: Final = 64
NUM_REQUESTS: Final = 512


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths in tokens, given by median and sigma of the logarithm, then clipped."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` lengths as int64."""
        drawn = rng.lognormal(np.log(self.median), self.sigma, count)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)


PROMPT: Final = Lengths(median=74.0, sigma=0.8, low=8, high=512)
OUTPUT: Final = Lengths(median=90.0, sigma=0.8, low=8, high=512)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the exact number of tokens its answer has; end-of-sequence is ignored."""

    prompt_ids: tuple[int, ...]
    output_tokens: int


def make_requests(
    vocab_size: int, *, count: int = NUM_REQUESTS, seed: int = 0
) -> tuple[Request, ...]:
    """The workload in arrival order; the same arguments give the same requests everywhere."""
    rng = np.random.default_rng(seed)
    prompt_lengths = PROMPT.draw(rng, count)
    output_lengths = OUTPUT.draw(rng, count)
    return tuple(
        Request(tuple(rng.integers(0, vocab_size, prompt_length).tolist()), int(output_length))
        for prompt_length, output_length in zip(prompt_lengths, output_lengths, strict=True)
    )


def warm_up_requests(requests: tuple[Request, ...]) -> tuple[Request, ...]:
    """A short run of the same kind: the first rows' prompts, few tokens each."""
    return tuple(Request(r.prompt_ids, min(r.output_tokens, 16)) for r in requests[:MAX_ROWS])


def equal_requests(
    vocab_size: int, *, count: int, prompt_tokens: int, output_tokens: int, seed: int
) -> tuple[Request, ...]:
    """Random prompts of one length, all with as many tokens to make."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, vocab_size, (count, prompt_tokens))
    return tuple(Request(tuple(prompt), output_tokens) for prompt in prompts.tolist())
