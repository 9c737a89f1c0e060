"""How long a slice takes: what was measured before serving, and what slices that ran tell.

A slice over B rows (the bucket that really runs) costs
    t = a + steps * (b + c log(1 + B) + d B) + e * sum over steps of tokens attended
        + f * prefill tokens
The terms are those of SCLS's model (`bilinear.py`) summed over a slice whose rows have any length,
but for the logarithm: on a CPU core a step of 8 rows takes three times as long as of 1, and of 64
twice as long as of 8 (a straight line was off by 9 % instead of 4.5 on live logs). Step 0 of a
slice with prompts is a step of its rows, too, whatever is in them: weights are read once more.

Under load nearly every slice has prompts and as many steps as the last, and nothing tells the cost
of a dispatch, a, from the others: fitted with them it was 30 to 60 ms instead of 2, or none. So it
is measured while nothing else runs, and the other five are fitted by recursive least squares with
forgetting; slices that compiled something must not be fed.
"""

import math
from typing import Final, NamedTuple

from .five_terms import FiveTerms


class SliceShape(NamedTuple):
    """What a slice runs; `rows` and `prefill_tokens` are those of its program, padding included.

    `attended_tokens` sums the context of each row over the steps, and `prefill_attended_tokens`
    that of each prompt token, where it is known. A row of n tokens attends to n, n + 1 ... in its
    decode steps; one whose prompt of n tokens ends in the slice gets its first token from the
    prompt, without a decode step, and attends to n + 1, n + 2 ... in the others.
    """

    steps: int
    rows: int
    attended_tokens: int
    prefill_tokens: int
    prefill_attended_tokens: int = 0


UNMEASURED_S: Final = 1e-3
"""Of a dispatch on nobody's device: an engine measures its own."""

_FIRST: Final = (2e-3, 1e-3, 1e-5, 1e-7, 1e-4)
_DEVIATION: Final = (1e-1, 1e-1, 1e-2, 1e-4, 1e-1)
"""How far the first values may be off: anything."""
_SPREAD: Final = 0.08
"""Of identical slices, relative: short slices weigh as much as long ones."""


class ServingTime:
    """Online least squares of relative errors, from first values that the first slices overrule.
    `dispatch_s`: what a slice takes beyond its steps and prompt tokens."""

    def __init__(self, dispatch_s: float = UNMEASURED_S, *, forgetting: float = 0.995):
        self._dispatch_s = dispatch_s
        self._fit = FiveTerms(_FIRST, scale=_DEVIATION, forgetting=forgetting, uncertainty=1.0)

    def predict_s(self, shape: SliceShape) -> float:
        """Seconds; never below a microsecond per step, whatever the fit says outside its data."""
        step, log_step, row_step, attended, prompt = self._fit.coefficients
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        step += log_step * math.log1p(rows) + row_step * rows
        seconds = self._dispatch_s + steps * step
        seconds += attended * attended_tokens + prompt * prefill_tokens
        return max(1e-6 * steps, seconds)

    def step_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of a decode step of rows with so many tokens together: asked before each slice.
        At least a microsecond."""
        step, log_step, row_step, attended, _ = self._fit.coefficients
        step += log_step * math.log1p(rows) + row_step * rows
        return max(1e-6, step + attended * context_tokens)

    def observe(self, shape: SliceShape, seconds: float) -> None:
        """Learn from one measured slice."""
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        weight = 1 / (_SPREAD * max(seconds, 1e-6))
        weighted_steps = weight * steps
        self._fit.observe(
            (
                weighted_steps,
                weighted_steps * math.log1p(rows),
                weighted_steps * rows,
                weight * attended_tokens,
                weight * prefill_tokens,
            ),
            weight * (seconds - self._dispatch_s),
        )
