"""Lengths in tokens: a constant or a distribution, as a command line names it. Draws nothing
without a generator that is handed in.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ALLOWED = "512, uniform:256,512 (ends included), or lognormal:mean,sigma,least,most"
_QUANTILES = 2048


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers from `least` to `most`. Lognormal with `sigma`: `mean` is its mean before it is
    rounded and cut to these ends; without, every length is as likely as another."""

    least: int
    most: int
    mean: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, name: str, text: str, *, least: int = 1) -> "Lengths":
        """Lengths from text, none below `least`. Raises ValueError with what is allowed."""
        try:
            lengths = cls._parse(text)
        except ValueError:
            raise ValueError(f"{name}: got {text!r}; allowed: {ALLOWED}") from None
        if not least <= lengths.least <= lengths.most <= 10**8:
            allowed = f"lengths from {least} to 1e8, the least first"
            raise ValueError(f"{name}: got {text!r}; allowed: {allowed}")
        return lengths

    @classmethod
    def _parse(cls, text: str) -> "Lengths":
        kind, colon, rest = text.partition(":")
        if not colon:
            return cls(int(text), int(text))
        if kind == "uniform":
            least, most = map(int, rest.split(","))
            return cls(least, most)
        if kind == "lognormal":
            mean, sigma, least, most = rest.split(",")
            lengths = cls(int(least), int(most), float(mean), float(sigma))
            if 0 < lengths.mean < math.inf and 0 < lengths.sigma < 10:
                return lengths
        raise ValueError(text)

    def draw(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """So many lengths, int64 [number]."""
        if not self.sigma:
            return rng.integers(self.least, self.most + 1, number)
        return self._rounded(rng.standard_normal(number))

    def average(self) -> float:
        """The mean of what is drawn."""
        if not self.sigma:
            return (self.least + self.most) / 2
        inverse = NormalDist().inv_cdf
        normal = [inverse((i + 0.5) / _QUANTILES) for i in range(_QUANTILES)]
        return float(self._rounded(np.array(normal)).mean())

    def _rounded(self, normal: np.ndarray) -> np.ndarray:
        middle = math.log(self.mean) - self.sigma**2 / 2
        # Cut before they are rounded: the far end may be more than an integer holds.
        lengths = np.exp(np.minimum(middle + self.sigma * normal, 50.0))
        return np.clip(np.rint(lengths), self.least, self.most).astype(np.int64)
