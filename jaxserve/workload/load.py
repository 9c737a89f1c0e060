"""From a configuration to a workload and its feed, and what a policy may ask of a workload.

Everything that can be wrong is said here, before anything runs.
"""

from collections.abc import Callable
from functools import partial

from jaxserve.errors import ConfigError
from jaxserve.workload.config import DEFAULT_NUM_REQUESTS, WorkloadConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.generators.table import generate
from jaxserve.workload.readers.trace import read_trace
from jaxserve.workload.scaling import scaled
from jaxserve.workload.work import Workload


def load_workload(
    config: WorkloadConfig, *, max_context: int | None = None
) -> tuple[Workload, Callable[[], Feed]]:
    """The workload, for models of `max_context` tokens, and what makes a feed of it.

    A trace is read and checked to its end. Raises ConfigError for what is wrong in it, and for
    settings that contradict each other or the workload.
    """
    num_requests = config.num_requests
    if config.trace:
        workload = read_trace(
            config.trace,
            trace_format=config.trace_format,
            client_from=config.client_from,
            jitter_s=config.jitter_s,
            seed=config.seed,
            from_s=config.trace_from_s,
            until_s=config.trace_until_s,
        )
    else:
        workload = generate(
            config.generator,
            config.workload_options,
            num_requests=num_requests or DEFAULT_NUM_REQUESTS,
            seed=config.seed,
        )
        num_requests = None
    if config.loop == "sessions":
        require_sessions(workload, "loop=sessions")
    if config.per_client:
        require_clients(workload, "per_client")
    workload = scaled(
        workload,
        rate=config.rate,
        time_scale=config.time_scale,
        length_scale=config.length_scale,
        num_requests=num_requests,
        max_tokens=config.max_tokens,
        max_context=max_context,
        cut=config.too_long == "cut",
    )
    make_feed = partial(
        Feed,
        workload,
        loop=config.loop,
        concurrency=config.concurrency,
        per_client=config.per_client,
    )
    return workload, make_feed


def require_prefixes(workload: Workload, what: str) -> None:
    """Raises ConfigError unless it is known what prompts share; `what` needs that."""
    if not workload.block_size:
        _lacks(
            workload,
            what,
            "shared prefixes",
            "a trace with block_hashes, or --workload=shared_prefix, chat or fair_mix",
        )


def require_clients(workload: Workload, what: str) -> None:
    """Raises ConfigError unless requests name their clients; `what` needs that."""
    if not workload.has_clients:
        hint = "a trace with clients, or a generator with --workload_options=clients=4"
        if workload.has_sessions:
            hint = f"--client_from=session, {hint}"
        _lacks(workload, what, "clients", hint)


def require_sessions(workload: Workload, what: str) -> None:
    """Raises ConfigError unless some requests belong together; `what` needs that."""
    if not workload.has_sessions:
        _lacks(workload, what, "sessions", "a trace with sessions, or --workload=chat")


def _lacks(workload: Workload, what: str, lacking: str, hint: str) -> None:
    raise ConfigError(
        f"{what}: got workload {workload.name!r}, which has no {lacking}; allowed: one that has;"
        f" try {hint}"
    )
