"""Every policy by name: what it is, where it comes from, what can be set, what it promises.

The server, the command line and the tests take policies from here, so that a name, its parameters
and its claims are written once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from . import laws, rule_laws
from .admission import (
    Admission,
    PastFuture,
    PastFutureParameters,
    Peak,
    Ratio,
    RatioParameters,
    ReserveMax,
    ReservePrompt,
    ReserveRemaining,
    SliceLease,
)
from .estimators.output_length import ClientHistory, Constant
from .order import Order
from .order.deadline import Deadline, DeadlineParameters
from .order.dfs_weight import DfsWeight
from .order.dlpm import Dlpm, DlpmParameters
from .order.fcfs import Fcfs
from .order.hrrn import Hrrn
from .order.larry import Larry, LarryParameters
from .order.lpm import Lpm, LpmParameters
from .order.priority import Priority, PriorityParameters
from .order.shortest_prefill_first import ShortestPrefillFirst
from .order.vtc import Vtc, VtcParameters
from .parameters import require
from .policy import Policy, by_name, describe, find, read_options
from .routing.catalog import ROUTINGS, RoutingPolicy, find_routing, make_routing, require_told
from .slicing import Adaptive, AdaptiveParameters, Fixed, SliceBounds, Slicing, WholeSequence
from .victims import VictimKey, fewest_made, newest

__all__ = [
    "ADMISSIONS",
    "ORDERS",
    "ROUTINGS",
    "SLICINGS",
    "VICTIMS",
    "AdmissionPolicy",
    "OrderPolicy",
    "RoutingPolicy",
    "SlicingPolicy",
    "VictimPolicy",
    "describe",
    "find_order",
    "find_routing",
    "find_slicing",
    "make_admission",
    "make_order",
    "make_routing",
    "make_slicing",
    "register",
    "require_told",
    "victim_key",
]

MakeOrder = Callable[[Any, int], Order]
"""make(parameters, page size in tokens)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy(Policy):
    """One order. `laws` are names of `laws.LAWS`.

    `tight` are options under which its laws are tested: small enough to bite in a short run.
    `needs_prefix_cache`: without one it would be another order in disguise.
    """

    make: MakeOrder
    tight: tuple[str, ...] = ()
    needs_prefix_cache: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPolicy(Policy):
    """One admission rule. `laws` are names of `rule_laws.ADMISSION_LAWS`."""

    make: Callable[[Any], Admission]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicingPolicy(Policy):
    """One slicing. `laws` are names of `rule_laws.SLICING_LAWS`; `bounds_gap`: it keeps to the
    longest gap that it is given; `weighs_dispatch`: what a dispatch takes matters to it."""

    make: Callable[[Any, SliceBounds], Slicing]
    bounds_gap: bool = False
    weighs_dispatch: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VictimPolicy(Policy):
    """One victim rule; a `key` None leaves it to the order."""

    key: VictimKey | None


_EVERYONE: Final = laws.OF_EVERYONE
_FAIR: Final = (*_EVERYONE, "work_conserving", "no_client_starves")

_ORDERS: Final = (
    OrderPolicy(
        name="fcfs",
        summary="by arrival",
        source="-",
        standing="published",
        make=lambda parameters, page_size: Fcfs(),
        laws=(*_FAIR, "no_request_starves"),
    ),
    OrderPolicy(
        name="priority",
        summary="by priority class (smaller is more urgent), then arrival; ages on wish",
        source="-",
        standing="published",
        make=lambda parameters, page_size: Priority(parameters),
        parameters=PriorityParameters,
        laws=(*_EVERYONE, "work_conserving"),
    ),
    OrderPolicy(
        name="deadline",
        summary="earliest deadline first, infeasible ones refused; those without one last",
        source="-",
        standing="published",
        make=lambda parameters, page_size: Deadline(parameters),
        parameters=DeadlineParameters,
        laws=(*_EVERYONE, "work_conserving"),
        aliases=("edf",),
    ),
    OrderPolicy(
        name="shortest_prefill_first",
        summary="fewest uncached prompt tokens first",
        source="sgl-project/sglang",
        standing="code",
        make=lambda parameters, page_size: ShortestPrefillFirst(page_size=page_size),
        laws=(*_EVERYONE, "work_conserving"),
    ),
    OrderPolicy(
        name="hrrn",
        summary="largest 1 + prompt tokens computed since arrival / uncached tokens",
        source="sgl-project/sglang",
        standing="code",
        make=lambda parameters, page_size: Hrrn(page_size=page_size),
        laws=(*_EVERYONE, "work_conserving"),
    ),
    OrderPolicy(
        name="larry",
        summary="largest 1 + waiting time / estimated prefill time; on wish small KV needs first"
        " while memory is short (reconstruction)",
        source="Is the GPU Half-Empty or Half-Full?, arXiv 2410.17840: the name and the idea alone",
        standing="reconstruction",
        make=lambda parameters, page_size: Larry(parameters, page_size=page_size),
        parameters=LarryParameters,
        laws=(*_EVERYONE, "work_conserving"),
        tight=("kv_gate=0.5",),
    ),
    OrderPolicy(
        name="dfs_weight",
        summary="depth first over the cached prefixes, branches with more waiting requests first",
        source="sgl-project/sglang",
        standing="code",
        make=lambda parameters, page_size: DfsWeight(),
        needs_prefix_cache=True,
        laws=(*_EVERYONE, "work_conserving"),
    ),
    OrderPolicy(
        name="lpm",
        summary="longest cached prefix first",
        source="SGLang, arXiv 2312.07104",
        standing="code",
        make=lambda parameters, page_size: Lpm(parameters, page_size=page_size),
        parameters=LpmParameters,
        needs_prefix_cache=True,
        laws=(*_EVERYONE, "work_conserving"),
    ),
    OrderPolicy(
        name="vtc",
        summary="the client that was charged least first",
        source="Fairness in Serving Large Language Models, arXiv 2401.00588",
        standing="code",
        make=lambda parameters, page_size: Vtc(parameters),
        parameters=VtcParameters,
        tight=("price_cached=0",),
        laws=(*_FAIR, "bounded_service_gap", "shares_evenly"),
    ),
    OrderPolicy(
        name="dlpm",
        summary="longest cached prefix first among clients with credit (reconstruction in part)",
        source="Locality-aware Fair Scheduling, arXiv 2501.14312, by two re-implementations",
        standing="re-implementation",
        make=lambda parameters, page_size: Dlpm(parameters),
        needs_prefix_cache=True,
        parameters=DlpmParameters,
        tight=(f"quantum={laws.MOST_QUANTUM}",),
        laws=(*_FAIR, "bounded_service_gap", "shares_evenly"),
    ),
)

_ADMISSIONS: Final = (
    AdmissionPolicy(
        name="slice_lease",
        summary="prompt, two slices ahead for every row and a watermark fit; limits are cut first",
        source="-",
        standing="project rule",
        make=lambda parameters: SliceLease(),
        laws=rule_laws.OF_EVERY_ADMISSION,
    ),
    AdmissionPolicy(
        name="reserve_max",
        summary="whatever all rows hold and may still make fits into the whole pool",
        source="-",
        standing="published",
        make=lambda parameters: ReserveMax(),
        laws=(*rule_laws.OF_EVERY_ADMISSION, "never_preempts"),
    ),
    AdmissionPolicy(
        name="reserve_remaining",
        summary="whatever all rows may still make fits into what is available",
        source="sgl-project/mini-sglang",
        standing="code",
        make=lambda parameters: ReserveRemaining(),
        laws=(*rule_laws.OF_EVERY_ADMISSION, "never_preempts"),
    ),
    AdmissionPolicy(
        name="reserve_prompt",
        summary="the prompt fits above a watermark; rows that grow may preempt",
        source="the vLLM-like scheduler of microsoft/vidur",
        standing="code",
        make=lambda parameters: ReservePrompt(),
        laws=rule_laws.OF_EVERY_ADMISSION,
    ),
    AdmissionPolicy(
        name="ratio",
        summary="a share of what rows may still make, falling with time, rising on preemption",
        source="sgl-project/sglang",
        standing="code",
        make=Ratio,
        parameters=RatioParameters,
        laws=rule_laws.OF_EVERY_ADMISSION,
    ),
    AdmissionPolicy(
        name="peak",
        summary="the most that will ever be held at once fits, if all make what they may",
        source="ModelTC/lightllm",
        standing="code",
        make=lambda parameters: Peak(),
        laws=(*rule_laws.OF_EVERY_ADMISSION, "never_preempts_in_step"),
    ),
    AdmissionPolicy(
        name="past_future",
        summary="peak, with outputs as long as the client's last ones (reconstruction)",
        source="Past-Future Scheduler, arXiv 2507.10150",
        standing="reconstruction",
        make=lambda parameters: PastFuture(
            ClientHistory(
                hist=parameters.hist,
                u=parameters.u,
                min_samples=parameters.min_samples,
                otherwise=Constant(parameters.expect),
            ),
            slack=parameters.slack,
        ),
        parameters=PastFutureParameters,
        laws=rule_laws.OF_EVERY_ADMISSION,
    ),
)

_SLICINGS: Final = (
    SlicingPolicy(
        name="adaptive",
        summary="the length that loses least to the host's work and to waiting for its end",
        source="-",
        standing="project rule",
        make=lambda parameters, bounds: Adaptive(bounds, parameters),
        parameters=AdaptiveParameters,
        laws=(*rule_laws.OF_EVERY_SLICING, "keeps_the_gap"),
        bounds_gap=True,
        weighs_dispatch=True,
    ),
    SlicingPolicy(
        name="fixed",
        summary="slice_steps steps, always",
        source="-",
        standing="project rule",
        make=lambda parameters, bounds: Fixed(bounds.slice_steps, depth=bounds.depth),
        laws=rule_laws.OF_EVERY_SLICING,
    ),
    SlicingPolicy(
        name="iteration",
        summary="one step: iteration-level scheduling, continuous batching",
        source="ILS in Slice-Level Scheduling, arXiv 2406.13511",
        standing="published",
        make=lambda parameters, bounds: Fixed(1, depth=bounds.depth),
        laws=rule_laws.OF_EVERY_SLICING,
    ),
    SlicingPolicy(
        name="sequence",
        summary="until all rows of the batch end, and only then the next batch",
        source="SLS in Slice-Level Scheduling, arXiv 2406.13511",
        standing="published",
        make=lambda parameters, bounds: WholeSequence(bounds.max_context),
        laws=rule_laws.OF_EVERY_SLICING,
    ),
)

_VICTIMS: Final = (
    VictimPolicy(
        name="order",
        summary="the last in the order; of vtc and dlpm, of the most overdrawn client",
        source="-",
        standing="project rule",
        key=None,
    ),
    VictimPolicy(
        name="newest",
        summary="the latest arrival",
        source="the vLLM-like scheduler of microsoft/vidur",
        standing="code",
        key=newest,
    ),
    VictimPolicy(
        name="fewest_made",
        summary="who has made the fewest tokens; of equals the longest prompt",
        source="sgl-project/sglang",
        standing="code",
        key=fewest_made,
    ),
)

_known: Final = {policy.name: policy for policy in _ORDERS}
ORDERS: Final[Mapping[str, OrderPolicy]] = MappingProxyType(_known)
ADMISSIONS: Final = by_name(_ADMISSIONS)
SLICINGS: Final = by_name(_SLICINGS)
VICTIMS: Final = by_name(_VICTIMS)


def register(policy: OrderPolicy) -> None:
    """Make an order known to all that take orders by name: engine, command line, suite of laws.

    Raises ValueError for a name or alias that is taken, and for a law that does not exist.
    """
    taken = {name for each in _known.values() for name in (each.name, *each.aliases)}
    for name in (policy.name, *policy.aliases):
        require(name not in taken, "order", name, "a name that no order has")
    for law in policy.laws:
        require(law in laws.LAWS, "law", law, ", ".join(laws.LAWS))
    _known[policy.name] = policy


def find_order(name: str) -> OrderPolicy:
    """The order of that name or alias. Raises ValueError with the nearest names."""
    return find("order", ORDERS, name)


def find_slicing(name: str) -> SlicingPolicy:
    """The slicing of that name. Raises ValueError with the nearest names."""
    return find("slicing", SLICINGS, name)


def make_order(name: str, options: Iterable[str] = (), *, page_size: int) -> Order:
    """An order as a command line names it; `options` are such as "quantum=4096".

    Raises ValueError for a name, a parameter or a value that does not exist.
    """
    policy = find_order(name)
    return policy.make(read_options("order", policy.parameters, options), page_size)


def make_admission(name: str, options: Iterable[str] = ()) -> Admission:
    """The same of an admission rule."""
    policy = find("admission", ADMISSIONS, name)
    return policy.make(read_options("admission", policy.parameters, options))


def make_slicing(name: str, options: Iterable[str] = (), *, bounds: SliceBounds) -> Slicing:
    """The same of a slicing."""
    policy = find_slicing(name)
    return policy.make(read_options("slicing", policy.parameters, options), bounds)


def victim_key(name: str) -> VictimKey | None:
    """The key of a victim rule; None: the order's own. Raises ValueError for an unknown name."""
    return find("victim", VICTIMS, name).key
