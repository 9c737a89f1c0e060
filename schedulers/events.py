"""What policies are told: plain records of what happened, in the order in which it happened.

A policy is a deterministic state machine over these. It reads no clock: time is a field. Requests
are named by the number the engine core gave them, which grows with arrival.
"""

from dataclasses import dataclass

RequestNumber = int


@dataclass(frozen=True, slots=True)
class Arrive:
    """A request joined the queue. `max_output` is per sample; `num_samples` rows are needed."""

    number: RequestNumber
    client: str
    priority: int
    arrived_s: float
    num_prompt_tokens: int
    max_output: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Admit:
    """It got its rows and leases. `num_extend_tokens` prompt tokens are not cached."""

    number: RequestNumber
    num_extend_tokens: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """It lost its rows and waits again; what it had made counts as prompt from now on."""

    number: RequestNumber


@dataclass(frozen=True, slots=True)
class Enact:
    """Tokens really run for it in a parsed slice."""

    number: RequestNumber
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """It ended by itself: all its samples met a stop or their limit."""

    number: RequestNumber


@dataclass(frozen=True, slots=True)
class Abort:
    """It was ended from outside, waiting or running: no trace of it may stay."""

    number: RequestNumber


Event = Arrive | Admit | Preempt | Enact | Finish | Abort
