"""How long a slice takes: what was measured before serving, and what slices that ran tell.

A slice over B rows (the bucket that really runs) costs
    t = a + m [with prompts] + steps * (b + c B) + d * sum over steps of tokens attended
        + e * prefill tokens
where step 0 of a slice with prompts is no decode step. The terms are those of SCLS's model
(`bilinear.py`) summed over a slice whose rows have any length, with the fixed costs of a dispatch
and of a step with prompts. Under load nearly every slice has prompts and as many steps as the last:
nothing tells those two from the others, and on a CPU a fit of all six believed in 30 to 60 ms for a
dispatch of 2, or for none. So they are measured while nothing else runs, and the other four are
fitted by recursive least squares with forgetting; slices that compiled something must not be fed.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

from ..parameters import require
from .four_terms import FourTerms


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


@dataclass(frozen=True, slots=True)
class SliceOverhead:
    """What a slice takes beyond its steps and prompt tokens, seconds: every slice, and on top of
    that one with prompts. An engine measures its own; the defaults are nobody's."""

    dispatch_s: float = 1e-3
    prompts_s: float = 2e-3

    def __post_init__(self) -> None:
        require(self.dispatch_s > 0, "dispatch_s", self.dispatch_s, "a positive number")
        require(self.prompts_s >= 0, "prompts_s", self.prompts_s, "0 or a positive number")


UNMEASURED: Final = SliceOverhead()

_FIRST: Final = (2e-3, 1e-4, 1e-7, 1e-4)
_DEVIATION: Final = (1e-1, 1e-2, 1e-4, 1e-1)
"""How far the first values may be off: anything."""
_SPREAD: Final = 0.08
"""Of identical slices, relative: short slices weigh as much as long ones. On the logs of a busy
server predictions are off by 4.7 % instead of 6 %."""


class ServingTime:
    """Online least squares of relative errors, from first values that the first slices overrule."""

    def __init__(self, overhead: SliceOverhead = UNMEASURED, *, forgetting: float = 0.995):
        self._dispatch_s = overhead.dispatch_s
        self._mixed_s = overhead.dispatch_s + overhead.prompts_s
        self._fit = FourTerms(_FIRST, scale=_DEVIATION, forgetting=forgetting, uncertainty=1.0)

    def predict_s(self, shape: SliceShape) -> float:
        """Seconds; never below a microsecond per step, whatever the fit says outside its data."""
        step, row_step, attended, prompt = self._fit.coefficients
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        seconds, decode_steps = self._dispatch_s, steps
        if prefill_tokens:
            seconds = self._mixed_s + prompt * prefill_tokens
            decode_steps -= 1
        seconds += decode_steps * (step + row_step * rows) + attended * attended_tokens
        return max(1e-6 * steps, seconds)

    def step_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of a decode step of rows with so many tokens together: asked before each slice.
        At least a microsecond."""
        step, row_step, attended, _ = self._fit.coefficients
        return max(1e-6, step + row_step * rows + attended * context_tokens)

    def observe(self, shape: SliceShape, seconds: float) -> None:
        """Learn from one measured slice."""
        steps, rows, attended_tokens, prefill_tokens, _ = shape
        weight = 1 / (_SPREAD * max(seconds, 1e-6))
        fixed_s, decode_steps = self._dispatch_s, steps
        if prefill_tokens:
            fixed_s, decode_steps = self._mixed_s, steps - 1
        self._fit.observe(
            (
                weight * decode_steps,
                weight * decode_steps * rows,
                weight * attended_tokens,
                weight * prefill_tokens,
            ),
            weight * (seconds - fixed_s),
        )
