"""Where random numbers and block ids of a generated workload come from.

Every quantity of every client has a stream of its own, spawned from the seed by (part, client,
purpose): a client more, another distribution of outputs or a greedier neighbour leaves all other
draws as they are. Block ids are cut up likewise, so that they do not depend on who drew first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

SHARED: Final = -1
"""The client of what all clients share."""
MOST_CLIENTS: Final = 2**18 - 2
MOST_PARTS: Final = 2**6
_CHUNKS: Final = (16, 64, 256, 1024)


class Purpose(IntEnum):
    """What a stream is drawn for. The numbers are part of what a seed means: only add."""

    ARRIVALS = 0
    PROMPT = 1
    OUTPUT = 2
    CHOICE = 3
    TURNS = 4
    THINK = 5
    TEXTS = 6
    ABORTS = 7
    PERIODS = 8


class Blocks:
    """Hands out block ids that nobody else has."""

    def __init__(self, first: int):
        self._next = first

    def take(self, number: int) -> tuple[int, ...]:
        first = self._next
        self._next += number
        return tuple(range(first, self._next))


@dataclass(frozen=True, slots=True)
class Streams:
    """Of one part of a workload; a workload without parts is part 0."""

    seed: int
    part: int = 0

    def rng(self, client: int, purpose: Purpose) -> np.random.Generator:
        path = (self.part, client - SHARED, purpose)
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=path))
        )

    def blocks(self, client: int) -> Blocks:
        """6 bits of an id are the part, 18 the client, 38 count."""
        return Blocks((self.part << 18 | client - SHARED) << 38)

    def values(
        self,
        client: int,
        purpose: Purpose,
        draw: Callable[[np.random.Generator, int], np.ndarray],
    ) -> Iterator:
        """Endless draws as Python numbers, made in chunks: small ones first, for a client in a
        thousand makes few requests."""
        rng = self.rng(client, purpose)
        for size in _CHUNKS:
            yield from draw(rng, size).tolist()
        while True:
            yield from draw(rng, _CHUNKS[-1]).tolist()


def zipf(number: int, exponent: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Draws of 0 ... number - 1 in proportion to 1 / (rank + 1) ** exponent; 0: all alike."""
    weights = np.arange(1, number + 1, dtype=np.float64) ** -exponent
    ends = np.cumsum(weights / weights.sum())
    ends[-1] = 1.0

    def draw(rng: np.random.Generator, size: int) -> np.ndarray:
        return np.searchsorted(ends, rng.random(size), side="right")

    return draw
