"""How long a slice takes, learnt from slices that ran.

A slice of `steps` steps over B rows (the bucket that really runs) costs
    t = a + steps * (b + c B) + d * sum over steps of tokens attended + e * prefill tokens
The terms are those of SCLS's model (`bilinear.py`) summed over a slice whose rows have any length,
with a fixed cost of dispatch. Fitted by recursive least squares with forgetting; slices that
compiled something must not be fed.
"""

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


_SCALE: Final = (1.0, 1e-1, 1e-3, 1e-5, 1e-3)
_PRIOR: Final = (1e-3, 2e-3, 1e-4, 1e-7, 1e-4)


class ServingTime:
    """Online least squares, from a prior that a first slice overrules."""

    def __init__(self, *, forgetting: float = 0.995):
        self._fit = FiveTerms(_PRIOR, scale=_SCALE, forgetting=forgetting)

    def predict_s(self, shape: SliceShape) -> float:
        """Seconds; never below a microsecond per step, whatever the fit says outside its data."""
        fixed, step, row_step, attended, prompt = self._fit.coefficients
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        seconds = fixed + steps * (step + row_step * rows)
        seconds += attended * attended_tokens + prompt * prefill_tokens
        return max(1e-6 * steps, seconds)

    def decode_s(self, rows: int, context_tokens: int) -> tuple[float, float]:
        """As `predict_s`, of one decode step and of two, without prompts, of rows with so many
        tokens together: what is asked before each slice."""
        fixed, step, row_step, attended, _ = self._fit.coefficients
        step += row_step * rows
        one = fixed + step + attended * context_tokens
        two = fixed + 2 * step + attended * (2 * context_tokens)
        return max(1e-6, one), max(2e-6, two)

    def observe(self, shape: SliceShape, seconds: float) -> None:
        """Learn from one measured slice."""
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        self._fit.observe((1.0, steps, steps * rows, attended_tokens, prefill_tokens), seconds)
