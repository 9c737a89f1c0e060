"""`jaxserve policies`: every policy and preset by name, with source, parameters and laws."""

from typing import Final

from jaxserve.flags import Settings
from jaxserve.schedulers import presets
from jaxserve.schedulers.catalog import (
    ADMISSIONS,
    ORDERS,
    ROUTINGS,
    SLICINGS,
    VICTIMS,
    describe,
)
from jaxserve.schedulers.pool.catalog import POOLS

_KINDS: Final = (
    ("orders: who is next (--order, --order_options)", ORDERS),
    ("admission rules: who fits (--admission, --admission_options)", ADMISSIONS),
    ("slicings: how long a slice runs (--slicing, --slicing_options)", SLICINGS),
    ("victim rules: who gives way when pages run short (--victim)", VICTIMS),
    ("routing policies: which replica of a fleet (--routing, --routing_options)", ROUTINGS),
    ("pool planners: over all replicas at once (--pool, --pool_options; simulated)", POOLS),
)


def main(settings: Settings) -> int:
    """Print the catalogue; returns the exit code."""
    for title, policies in _KINDS:
        _print(title, [describe(policy) for policy in policies.values()])
    title = "presets: all of these under one name (--preset); what is set beside it wins"
    _print(title, [presets.describe(preset) for preset in presets.PRESETS.values()])
    return 0


def _print(title: str, entries: list[list[str]]) -> None:
    print(f"{title}\n")
    for lines in entries:
        print("\n".join(lines), end="\n\n")
