"""How long a slice takes, learnt from slices that ran.

A slice over B rows (the bucket that really runs) costs
    t = a + m [with prompts] + steps * (b + c B) + d * sum over steps of tokens attended
        + e * prefill tokens
where step 0 of a slice with prompts is no decode step. The terms are those of SCLS's model
(`bilinear.py`) summed over a slice whose rows have any length, with the fixed costs of a dispatch
and of a step with prompts. Fitted by recursive least squares with forgetting; slices that compiled
something must not be fed.
"""

from typing import Final, NamedTuple

from .six_terms import SixTerms


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


_FIRST: Final = (1e-3, 2e-3, 2e-3, 1e-4, 1e-7, 1e-4)
_DEVIATION: Final = (1e-3, 2e-2, 1e-1, 1e-2, 1e-4, 1e-1)
"""How far the first values may be off: of a dispatch little, of the others anything. Under load
nearly every slice has prompts, and what theirs cost is not to be told from a dispatch; believed to
be one, it was 30 to 60 ms instead of 2 (measured on a CPU), or none of both."""
_SPREAD: Final = 0.08
"""Of identical slices, relative: short slices weigh as much as long ones, and they know what a
dispatch costs. On the logs of a busy server predictions are off by 4.7 % instead of 6 %."""


class ServingTime:
    """Online least squares of relative errors, from first values that the first slices overrule."""

    def __init__(self, *, forgetting: float = 0.995):
        self._fit = SixTerms(_FIRST, scale=_DEVIATION, forgetting=forgetting, uncertainty=1.0)

    def predict_s(self, shape: SliceShape) -> float:
        """Seconds; never below a microsecond per step, whatever the fit says outside its data."""
        fixed, mixed, step, row_step, attended, prompt = self._fit.coefficients
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        seconds = fixed + attended * attended_tokens
        decode_steps = steps
        if prefill_tokens:
            seconds += mixed + prompt * prefill_tokens
            decode_steps -= 1
        return max(1e-6 * steps, seconds + decode_steps * (step + row_step * rows))

    def prompts_s(self) -> float:
        """Seconds that a slice with prompts takes beyond its tokens; 0 or more."""
        return max(0.0, self._fit.coefficients[1])

    def decode_s(self, rows: int, context_tokens: int) -> tuple[float, float]:
        """As `predict_s`, of one decode step and of two, without prompts, of rows with so many
        tokens together: what is asked before each slice."""
        fixed, _, step, row_step, attended, _ = self._fit.coefficients
        step += row_step * rows
        one = fixed + step + attended * context_tokens
        two = fixed + 2 * step + attended * (2 * context_tokens)
        return max(1e-6, one), max(2e-6, two)

    def observe(self, shape: SliceShape, seconds: float) -> None:
        """Learn from one measured slice."""
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        weight = 1 / (_SPREAD * max(seconds, 1e-6))
        decode_steps, mixed = (steps - 1, weight) if prefill_tokens else (steps, 0.0)
        self._fit.observe(
            (
                weight,
                mixed,
                weight * decode_steps,
                weight * decode_steps * rows,
                weight * attended_tokens,
                weight * prefill_tokens,
            ),
            weight * seconds,
        )
