"""How long a slice takes, learnt from slices that ran.

A slice of `steps` steps over B rows (the bucket that really runs) costs
    t = a + steps * (b + c B) + d * sum over steps of tokens attended + e * prefill tokens
The terms are those of SCLS's bilinear model (papers.md 1.2) summed over a slice, with a fixed cost
of dispatch. Fitted by recursive least squares with forgetting; slices that compiled something must
not be fed.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SliceShape:
    """What a slice runs: `attended_tokens` sums the context of each row over the steps."""

    steps: int
    rows: int
    attended_tokens: int
    prefill_tokens: int


class ServingTime:
    """Online least squares. Columns are scaled so that the normal matrix stays well conditioned."""

    _scale = np.array([1.0, 1e-1, 1e-3, 1e-5, 1e-3])
    _prior = np.array([1e-3, 2e-3, 1e-4, 1e-7, 1e-4])

    def __init__(self, *, forgetting: float = 0.995):
        self._forgetting = forgetting
        self._weights = self._prior / self._scale
        self._covariance = np.eye(5) * 1e2
        self.num_observed = 0

    def _features(self, shape: SliceShape) -> np.ndarray:
        row_steps = shape.steps * shape.rows
        raw = (1.0, shape.steps, row_steps, shape.attended_tokens, shape.prefill_tokens)
        return np.array(raw) * self._scale

    def predict_s(self, shape: SliceShape) -> float:
        """Seconds; never below a microsecond per step, whatever the fit says outside its data."""
        return max(1e-6 * shape.steps, float(self._weights @ self._features(shape)))

    def observe(self, shape: SliceShape, seconds: float) -> None:
        """Learn from one measured slice."""
        x = self._features(shape)
        gain = self._covariance @ x / (self._forgetting + x @ self._covariance @ x)
        self._weights = self._weights + gain * (seconds - self._weights @ x)
        self._covariance = (self._covariance - np.outer(gain, x @ self._covariance)) / (
            self._forgetting
        )
        trace = np.trace(self._covariance)
        if trace > 1e6:  # forgetting without new directions lets it blow up: bound it
            self._covariance *= 1e6 / trace
        self.num_observed += 1
