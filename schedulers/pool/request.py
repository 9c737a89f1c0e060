"""What a pool planner is told and what it decides: requests, batches, and what became of a batch.

A planner never hears how much a request will make, only the limit it stated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class PoolRequest:
    """One request as its planner sees it. `number` names it; `made` grows slice by slice.

    `holder` is the instance that holds its pages between slices (`scls_resident` alone), and
    `last_ran` counts up with every slice: the smaller, the longer ago it ran.
    """

    number: int
    arrival_s: float
    prompt_tokens: int
    max_output: int
    made: int = 0
    holder: int | None = None
    last_ran: int = -1

    @property
    def length(self) -> int:
        """Tokens it has: what a prefill would have to compute."""
        return self.prompt_tokens + self.made

    def slices_left(self, slice_len: int) -> int:
        """Slices of so many tokens that it may still need."""
        return -(-(self.max_output - self.made) // slice_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One dispatch: `rows` (numbers of requests) run on `instance` for at most `steps` steps.

    `length` is what the rows are padded to, `estimate_s` the seconds counted as load until it has
    run. `prefills` are the rows whose tokens are computed again, `prefill_length` the longest of
    them: in the base form all rows. `drops` are requests whose pages the instance frees first.
    """

    ticket: int
    instance: int
    rows: tuple[int, ...]
    length: int
    steps: int
    estimate_s: float
    prefills: frozenset[int]
    prefill_length: int
    drops: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a batch: steps and seconds it took, tokens that each row made, who ended."""

    steps: int
    seconds: float
    made: Mapping[int, int]
    ended: frozenset[int] = field(default_factory=frozenset)
