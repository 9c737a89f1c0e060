"""Every routing policy by name: what it is, where it comes from, what can be set, what it promises,
and what requests must tell for it to mean anything."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..parameters import require
from ..policy import Policy, by_name, find, read_options
from . import laws
from .base import Routing
from .cache_aware import CacheAware, CacheAwareParameters
from .conversation_affinity import ConversationAffinity, ConversationAffinityParameters
from .d2lpm import D2lpm, D2lpmParameters
from .least_kv import LeastKv
from .least_load import LeastLoad, LeastLoadParameters
from .least_requests import LeastRequests
from .least_tokens import LeastTokens
from .power_of_two import PowerOfTwo
from .random import RandomReplica, SeedParameters
from .round_robin import RoundRobin
from .sal import Sal, SalParameters

Need = Literal["prefixes", "clients", "sessions"]
"""What requests tell: which pages their prompts share, who sent them, which conversation it is."""

MakeRouting = Callable[[Any, int, int], Routing]
"""make(parameters, number of replicas, page size in tokens)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy(Policy):
    """One routing policy. `laws` are names of `laws.LAWS`, tested under the options `tight`.
    Without what it `needs` it would be another policy in disguise."""

    make: MakeRouting
    needs: tuple[Need, ...] = ()
    tight: tuple[str, ...] = ()


_EVERYONE: Final = laws.OF_EVERYONE
_BY_LOAD: Final = (*_EVERYONE, "longer_queues_attract_nobody")

_ROUTINGS: Final = (
    RoutingPolicy(
        name="round_robin",
        summary="the next healthy replica",
        source="-",
        standing="published",
        make=lambda parameters, num_replicas, page_size: RoundRobin(),
        laws=_EVERYONE,
    ),
    RoutingPolicy(
        name="random",
        summary="any healthy replica",
        source="-",
        standing="published",
        make=lambda parameters, num_replicas, page_size: RandomReplica(parameters),
        parameters=SeedParameters,
        laws=_EVERYONE,
    ),
    RoutingPolicy(
        name="least_requests",
        summary="fewest requests waiting or running",
        source="microsoft/vidur",
        standing="code",
        make=lambda parameters, num_replicas, page_size: LeastRequests(),
        laws=_BY_LOAD,
        aliases=("jsq",),
    ),
    RoutingPolicy(
        name="least_tokens",
        summary="fewest uncached prompt tokens waiting or on their way",
        source="-",
        standing="published",
        make=lambda parameters, num_replicas, page_size: LeastTokens(),
        laws=_BY_LOAD,
    ),
    RoutingPolicy(
        name="least_kv",
        summary="smallest share of KV memory in use, prompts on their way included",
        source="-",
        standing="published",
        make=lambda parameters, num_replicas, page_size: LeastKv(),
        laws=_BY_LOAD,
    ),
    RoutingPolicy(
        name="power_of_two",
        summary="of two drawn replicas the one with fewer requests",
        source="-",
        standing="published",
        make=lambda parameters, num_replicas, page_size: PowerOfTwo(parameters),
        parameters=SeedParameters,
        laws=_EVERYONE,
    ),
    RoutingPolicy(
        name="least_load",
        summary="fewest seconds of queue, with a price of full KV memory",
        source="lightseekorg/smg",
        standing="code",
        make=lambda parameters, num_replicas, page_size: LeastLoad(parameters),
        parameters=LeastLoadParameters,
        laws=_BY_LOAD,
    ),
    RoutingPolicy(
        name="conversation_affinity",
        summary="where the session's hash says, unless too much is there",
        source="consistent hashing with bounded loads, arXiv 1608.01350",
        standing="published",
        make=lambda parameters, num_replicas, page_size: ConversationAffinity(
            parameters, num_replicas=num_replicas
        ),
        parameters=ConversationAffinityParameters,
        needs=("sessions",),
        laws=_EVERYONE,
    ),
    RoutingPolicy(
        name="cache_aware",
        summary="the longest cached prefix if it is long and loads are balanced, else the least"
        " load",
        source="lightseekorg/smg",
        standing="code",
        make=lambda parameters, num_replicas, page_size: CacheAware(
            parameters, num_replicas=num_replicas, page_size=page_size
        ),
        parameters=CacheAwareParameters,
        needs=("prefixes",),
        laws=_EVERYONE,
    ),
    RoutingPolicy(
        name="sal",
        summary="where a request could start first, by work queued and memory (reconstruction)",
        source="Is the GPU Half-Empty or Half-Full?, arXiv 2410.17840: the name and the idea alone",
        standing="reconstruction",
        make=lambda parameters, num_replicas, page_size: Sal(parameters),
        parameters=SalParameters,
        laws=_BY_LOAD,
    ),
    RoutingPolicy(
        name="d2lpm",
        summary="the longest cached prefix among replicas on which the client has credit"
        " (reconstruction in part)",
        source="Locality-aware Fair Scheduling, arXiv 2501.14312, by a re-implementation",
        standing="re-implementation",
        make=lambda parameters, num_replicas, page_size: D2lpm(
            parameters, num_replicas=num_replicas, page_size=page_size
        ),
        parameters=D2lpmParameters,
        needs=("prefixes", "clients"),
        tight=(f"worker_quantum={laws.MOST_QUANTUM}",),
        laws=(*_EVERYONE, "credit_stays_in_range", "replicas_share_each_client"),
    ),
)

ROUTINGS: Final[Mapping[str, RoutingPolicy]] = by_name(_ROUTINGS)


def find_routing(name: str) -> RoutingPolicy:
    """The routing policy of that name or alias. Raises ValueError with the nearest names."""
    return find("routing", ROUTINGS, name)


def make_routing(
    name: str, options: Iterable[str] = (), *, num_replicas: int, page_size: int
) -> Routing:
    """A routing policy as a command line names it; `options` are such as "worker_quantum=4096".

    Raises ValueError for a name, a parameter or a value that does not exist.
    """
    policy = find_routing(name)
    return policy.make(read_options("routing", policy.parameters, options), num_replicas, page_size)


def require_told(name: str, told: Collection[Need], *, by: str) -> None:
    """Raises ValueError where a routing policy needs what requests do not tell; `by` names where
    they come from, such as "trace azure.csv"."""
    missing = [need for need in find_routing(name).needs if need not in told]
    blind = [policy.name for policy in _ROUTINGS if set(policy.needs) <= set(told)]
    lacks = f"{', '.join(blind)}; {name} needs {' and '.join(missing)}, and {by} has none"
    require(not missing, "routing", name, lacks)
