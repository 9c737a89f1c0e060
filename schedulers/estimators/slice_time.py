"""How long a slice takes on a device, and its host around it: the protocol and what goes in.

`fitted_time.py` is fitted to measured slices, `roofline_time.py` computed from data sheets;
`NoisyTime` makes either scatter as measured slices do. They know no requests, pages or policies.
"""

import math
import random
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .serving_time import SliceShape


@runtime_checkable
class SliceTime(Protocol):
    """A model of one deployment: model shape, device, precision."""

    def slice_s(self, shape: SliceShape) -> float:
        """Seconds that the device is busy with a slice."""
        ...

    def host_s(self, shape: SliceShape) -> float:
        """Seconds of the host's work around it, which overlap hides."""
        ...


@dataclass(frozen=True, slots=True)
class HostTime:
    """Seconds of the host's processor around a slice: `slice_s` for any, `row_s` for each row,
    `token_s` for each row and step (at most a token to hand on), `prompt_s` for each prompt
    token."""

    slice_s: float = 0.0
    row_s: float = 0.0
    token_s: float = 0.0
    prompt_s: float = 0.0

    def seconds(self, shape: SliceShape) -> float:
        rows = shape.rows * (self.row_s + self.token_s * shape.steps)
        return self.slice_s + rows + self.prompt_s * shape.prefill_tokens


class NoisyTime:
    """Another model's seconds, each times a lognormal number of mean 1.

    `spread` is the mean relative distance of identical slices from their median, as profiles report
    it. The same seed gives the same numbers in the same order; the host's part has no noise.
    """

    def __init__(self, time: SliceTime, *, spread: float, seed: int):
        self._time = time
        self._sigma = spread * math.sqrt(math.pi / 2)  # E|x| of a normal x is sigma sqrt(2 / pi)
        self._random = random.Random(seed)

    def slice_s(self, shape: SliceShape) -> float:
        drawn = self._random.gauss(-self._sigma * self._sigma / 2, self._sigma)
        return self._time.slice_s(shape) * math.exp(drawn)

    def host_s(self, shape: SliceShape) -> float:
        return self._time.host_s(shape)
