"""What policies are told: plain records of what happened, in the order in which it happened.

A policy is a deterministic state machine over these. It reads no clock: time is a field. Requests
are named by the number the engine core gave them, which grows with arrival. Nobody changes a
record; they are not frozen, which takes three times as long to make.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .prefix_tree import Cleared, Removed, Stored

RequestNumber = int


@dataclass(slots=True)
class Arrive:
    """A request joined the queue. `max_output` is per sample; `num_samples` rows are needed.

    `weight` is its client's share beside others'. `page_keys` name the pages that its prompt could
    find cached, of which the first `num_cached` are. `deadline_s` is on the clock of `arrived_s`;
    `service_s` is what the request takes alone until it may end, by estimate, and 0 when there is
    no estimate or no deadline.
    """

    number: RequestNumber
    client: str
    priority: int
    arrived_s: float
    num_prompt_tokens: int
    max_output: int
    num_samples: int
    weight: float = 1.0
    page_keys: tuple[bytes, ...] = ()
    num_cached: int = 0
    deadline_s: float | None = None
    service_s: float = 0.0


@dataclass(slots=True)
class Admit:
    """It got its rows and leases. `num_extend_tokens` prompt tokens are not cached."""

    number: RequestNumber
    num_extend_tokens: int


@dataclass(slots=True)
class Misfit:
    """The order named it, and it does not fit in this pass, which a `Tick` began.

    An order that looks past it names another one next; whoever names it again ends the pass.
    """

    number: RequestNumber


@dataclass(slots=True)
class Preempt:
    """It lost its rows and waits again; what it had made counts as prompt from now on.

    The first `num_cached` of its page keys are cached.
    """

    number: RequestNumber
    num_cached: int = 0


Ran = tuple[RequestNumber, int, int]
"""A request, and how many of its prompt tokens and how many output tokens were run."""


@dataclass(slots=True)
class Enact:
    """Tokens really run, by request: one event for all that a slice ran, or all its chunks.

    Less than 0 output tokens: so many never counted, since a stop string was found in front.
    """

    ran: Sequence[Ran]


@dataclass(slots=True)
class Finish:
    """It ended by itself: all its samples met a stop or their limit."""

    number: RequestNumber


@dataclass(slots=True)
class Abort:
    """It was ended from outside, waiting or running: no trace of it may stay."""

    number: RequestNumber


@dataclass(slots=True)
class Tick:
    """A plan is about to be made, at `now_s` on the engine's clock. `free_share` of the KV pool's
    pages, in [0, 1], can be had now: free, or cached and read by nobody."""

    now_s: float
    free_share: float = 1.0


CacheChange = Stored | Removed | Cleared
"""What the prefix cache holds has changed. Told at once, before the next event of another kind."""

Event = Arrive | Admit | Misfit | Preempt | Enact | Finish | Abort | Tick | CacheChange

Takes = Mapping[type, Callable[[Any], None]]
"""What a policy does about events, by their class. A slice brings hundreds, and asking for one
class after the other takes longer than what most policies do then."""
