"""A request of a generated text, and what the kinds of texts have in common.

A kind of text is a record of parameters, derived from `Traffic`, with three methods:
`texts(streams)` gives a function from a client to its starts, `requests_per_start()` says how many
requests one has on average, and `longest_tokens()` bounds prompt and output of any request. What
several requests share is a whole number of blocks, rounded up.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxserve.workload.generators.lengths import Lengths
from jaxserve.workload.generators.streams import Purpose, Streams


class Turn(NamedTuple):
    """One request of a start, sent `offset_s` after it in an open loop; 0 for the first."""

    offset_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    think_s: float | None = None


Starts = Callable[[int], Iterator[list[Turn]]]
"""starts(client): the turns of each of its starts, one or more; endless."""


def whole(tokens: int, block_size: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // block_size)


def drawn(streams: Streams, client: int, purpose: Purpose, lengths: Lengths) -> Iterator[int]:
    return streams.values(client, purpose, lengths.draw)


def thinking(streams: Streams, client: int, mean_s: float) -> Iterator[float]:
    return streams.values(client, Purpose.THINK, lambda rng, n: rng.exponential(mean_s, n))
