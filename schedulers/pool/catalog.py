"""Every pool planner by name, as `schedulers/catalog.py` has the policies of one engine."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..policy import Policy, by_name, find, read_options
from . import laws
from .planner import Planner, PoolSetup
from .scls import Scls, SclsParameters
from .scls_resident import SclsResident, SclsResidentParameters
from .static import Static, StaticParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPolicy(Policy):
    """One planner over all instances. `laws` are names of `laws.POOL_LAWS`.

    `resident`: KV stays between slices, so that it needs a continuous engine rather than padded
    static batches. `tight` are options under which its laws are tested.
    """

    make: Callable[[Any, PoolSetup], Planner]
    tight: tuple[str, ...] = ()
    resident: bool = False


_POOLS: Final = (
    PoolPolicy(
        name="static",
        summary="sequence-level scheduling: static batches of a fixed size, instances in turn"
        " (reconstruction in part)",
        source="SLS, the baseline in Slice-Level Scheduling, arXiv 2406.13511",
        standing="reconstruction",
        make=Static,
        parameters=StaticParameters,
        tight=(f"max_input={laws.LONGEST_PROMPT}", f"max_output={laws.MOST_OUTPUT}"),
        laws=laws.OF_EVERY_POOL,
    ),
    PoolPolicy(
        name="scls",
        summary="slices, batches by dynamic programming, max-min offloading, prompts computed again"
        " each slice (reconstruction but for these four ideas)",
        source="Slice-Level Scheduling, arXiv 2406.13511",
        standing="reconstruction",
        make=Scls,
        parameters=SclsParameters,
        laws=(*laws.OF_EVERY_POOL, "no_instance_idles"),
    ),
    PoolPolicy(
        name="scls_resident",
        summary="the same with KV that stays between slices and moves when that is worth it",
        source="-",
        standing="project rule",
        make=SclsResident,
        parameters=SclsResidentParameters,
        laws=(*laws.OF_EVERY_POOL, "no_instance_idles"),
        resident=True,
    ),
)

POOLS: Final[Mapping[str, PoolPolicy]] = by_name(_POOLS)


def make_pool(name: str, options: Iterable[str], setup: PoolSetup) -> Planner:
    """A planner as a command line names it; `options` are such as "step=ab".

    Raises ValueError for a name, a parameter or a value that does not exist, and for an estimate
    that falls with length.
    """
    policy = find("pool", POOLS, name)
    return policy.make(read_options("pool", policy.parameters, options), setup)
