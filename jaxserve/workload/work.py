"""One request of a workload, and a workload: what load client and simulator both run.

Knows no tokens, no transport and no engine. Tokens are drawn from a request by `tokens.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Work:
    """One request. Never changed once made; not frozen, which takes three times as long.

    `number` is its place in the workload, from 0: it names the request and seeds what it shares
    with nobody. `arrival_s` counts from the workload's start. `output_tokens` is what it will make,
    which no policy may know; `max_tokens` is the limit it states, at least as much. `blocks` are
    the ids of its first blocks of `Workload.block_size` prompt tokens, chained: equal ids at a
    place mean that the whole prompts up to there are equal. The last block may be cut short by the
    prompt's end; what follows the blocks is its own. `deadline_s`, `abort_s` (its client hangs up)
    and `think_s` (after the end of the session's request before it, where sessions wait) are
    durations.
    """

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    client: str = "anonymous"
    weight: float = 1.0
    blocks: tuple[int, ...] = ()
    session: str | None = None
    priority: int = 0
    deadline_s: float | None = None
    abort_s: float | None = None
    think_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests by arrival. `requests` starts over with every call and gives the same each time.

    `block_size` 0: nothing is known of shared prefixes. `has_clients`: requests name who sent them;
    `has_sessions`: some belong together, one after the other. `rate` is requests per second on
    average, 0: not known. `longest_tokens`: no request has more prompt and output tokens together;
    0: not known. `described` says in words what it is (source, licence, seed, parameters), for the
    report.
    """

    name: str
    requests: Callable[[], Iterator[Work]]
    num_requests: int
    block_size: int = 0
    has_clients: bool = False
    has_sessions: bool = False
    rate: float = 0.0
    longest_tokens: int = 0
    described: Mapping[str, str] = field(default_factory=dict)
