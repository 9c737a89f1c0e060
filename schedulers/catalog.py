"""Every policy by name: what it is, where it comes from, what can be set, what it promises.

The server, the command line and the tests take policies from here, so that a name, its parameters
and its claims are written once.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from . import laws
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
from .parameters import NoParameters, read, require

Standing = Literal["published", "code", "re-implementation", "reconstruction", "project rule"]
"""How sure it is that a policy is what its source means; reconstruction is said in its summary."""

MakeOrder = Callable[[Any, int], Order]
"""make(parameters, page size in tokens)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy:
    """One order. `make` gets an instance of `parameters`; `laws` are names of `laws.LAWS`.

    `tight` are options under which its laws are tested: small enough to bite in a short run.
    """

    name: str
    summary: str
    source: str
    standing: Standing
    make: MakeOrder
    parameters: type = NoParameters
    laws: tuple[str, ...] = ()
    tight: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


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
        summary="largest 1 + waiting time / estimated prefill time (reconstruction)",
        source="Is the GPU Half-Empty or Half-Full?, arXiv 2410.17840: the name and the idea alone",
        standing="reconstruction",
        make=lambda parameters, page_size: Larry(parameters, page_size=page_size),
        parameters=LarryParameters,
        laws=(*_EVERYONE, "work_conserving"),
    ),
    OrderPolicy(
        name="dfs_weight",
        summary="depth first over the cached prefixes, branches with more waiting requests first",
        source="sgl-project/sglang",
        standing="code",
        make=lambda parameters, page_size: DfsWeight(),
        laws=(*_EVERYONE, "work_conserving"),
    ),
    OrderPolicy(
        name="lpm",
        summary="longest cached prefix first",
        source="SGLang, arXiv 2312.07104",
        standing="code",
        make=lambda parameters, page_size: Lpm(parameters, page_size=page_size),
        parameters=LpmParameters,
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
        parameters=DlpmParameters,
        tight=(f"quantum={laws.MOST_QUANTUM}",),
        laws=(*_FAIR, "bounded_service_gap", "shares_evenly"),
    ),
)

_known: Final = {policy.name: policy for policy in _ORDERS}
ORDERS: Final[Mapping[str, OrderPolicy]] = MappingProxyType(_known)


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
    for policy in ORDERS.values():
        if name == policy.name or name in policy.aliases:
            return policy
    near = difflib.get_close_matches(name, ORDERS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"order: got {name!r}; allowed: {', '.join(ORDERS)}{hint}")


def make_order(name: str, options: Iterable[str] = (), *, page_size: int) -> Order:
    """An order as a command line names it; `options` are such as "quantum=4096".

    Raises ValueError for a name, a parameter or a value that does not exist.
    """
    policy = find_order(name)
    texts = {}
    for option in options:
        parameter, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"got {option!r}; options look like parameter=value")
        if parameter in texts:
            raise ValueError(f"{parameter}: got it twice; allowed: once")
        texts[parameter] = text
    return policy.make(read(policy.parameters, texts), page_size)


def describe(policy: OrderPolicy) -> list[str]:
    """A policy in a few lines, for people."""
    fields = dataclasses.fields(policy.parameters)
    parameters = ", ".join(f"{field.name}={field.default}" for field in fields)
    names = " ".join((policy.name, *policy.aliases))
    lines = [f"{names}: {policy.summary}", f"  source: {policy.source} ({policy.standing})"]
    if parameters:
        lines.append(f"  parameters: {parameters}")
    return [*lines, f"  laws: {', '.join(policy.laws)}"]
