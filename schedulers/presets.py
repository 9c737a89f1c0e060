"""Presets: policies and their options under one name, for one replica or for a fleet.

What is set beside a preset wins over it. Knows the settings by name only: their defaults and
what they mean belong to the engine's configuration.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from .policy import Standing, not_found

_OPTIONS: Final = "_options"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`settings` are values by name; what it leaves out keeps its default. `fleet` are settings
    that it has beside them where there is a fleet."""

    name: str
    summary: str
    source: str
    standing: Standing
    settings: Mapping[str, Any]
    fleet: Mapping[str, Any] = field(default_factory=dict)

    def fill(self, given: Mapping[str, Any], *, fleet: bool = False) -> dict[str, Any]:
        """What it sets beside `given`, the settings that somebody chose; those of a `fleet` too.

        Options are merged parameter by parameter; a preset's options go with the policy that they
        are for, so that another policy chosen instead starts from its own defaults.
        """
        filled = {}
        settings = {**self.settings, **(self.fleet if fleet else {})}
        for name, value in settings.items():
            if name.endswith(_OPTIONS):
                policy = name.removesuffix(_OPTIONS)
                if given.get(policy, settings[policy]) == settings[policy]:
                    filled[name] = _merged(value, given.get(name, ()))
            elif name not in given:
                filled[name] = value
        return filled


def _merged(options: Iterable[str], chosen: Iterable[str]) -> tuple[str, ...]:
    """`options` without the parameters that `chosen` sets, and `chosen`."""
    chosen = tuple(chosen)
    names = {option.partition("=")[0] for option in chosen}
    return (*(option for option in options if option.partition("=")[0] not in names), *chosen)


_PRESETS: Final = (
    Preset(
        name="default",
        summary="first come, first served, in slices of adaptive length",
        source="-",
        standing="project rule",
        settings={},
    ),
    Preset(
        name="sls",
        summary="sequence-level scheduling: static batches that run until all members end",
        source="SLS, the baseline in Slice-Level Scheduling, arXiv 2406.13511",
        standing="published",
        settings={"order": "fcfs", "slicing": "sequence", "admission": "reserve_max"},
        fleet={"pool": "static"},
    ),
    Preset(
        name="ils",
        summary="iteration-level scheduling: continuous batching, one step at a time",
        source="ILS, the baseline in Slice-Level Scheduling, arXiv 2406.13511",
        standing="published",
        settings={"order": "fcfs", "slicing": "iteration", "admission": "reserve_prompt"},
    ),
    Preset(
        name="vtc",
        summary="fair by client, all prompt tokens at full price",
        source="Fairness in Serving Large Language Models, arXiv 2401.00588",
        standing="code",
        settings={"order": "vtc", "order_options": ("price_cached=1",)},
    ),
    Preset(
        name="lpm",
        summary="longest cached prefix first",
        source="SGLang, arXiv 2312.07104",
        standing="code",
        settings={"order": "lpm"},
    ),
    Preset(
        name="dlpm",
        summary="longest cached prefix first, fair by client (reconstruction in part)",
        source="Locality-aware Fair Scheduling, arXiv 2501.14312, by two re-implementations",
        standing="re-implementation",
        settings={"order": "dlpm"},
    ),
    Preset(
        name="larry",
        summary="largest response ratio in seconds, while slices ahead fit (reconstruction)",
        source="Is the GPU Half-Empty or Half-Full?, arXiv 2410.17840: the name and the idea alone",
        standing="reconstruction",
        settings={"order": "larry", "admission": "slice_lease", "slicing": "adaptive"},
    ),
)

_FLEET_PRESETS: Final = (
    Preset(
        name="scls",
        summary="slices of padded batches, planned over a pool; recompute between slices"
        " (reconstruction in part)",
        source="Slice-Level Scheduling, arXiv 2406.13511",
        standing="reconstruction",
        settings={"pool": "scls", "pool_options": ("step=lb",)},
    ),
    Preset(
        name="scls_resident",
        summary="slices planned over a pool; KV stays between slices and moves when worth it",
        source="-",
        standing="project rule",
        settings={"pool": "scls_resident"},
    ),
    Preset(
        name="d2lpm",
        summary="dlpm on every replica, and credit by client and replica between them"
        " (reconstruction in part)",
        source="Locality-aware Fair Scheduling, arXiv 2501.14312, by two re-implementations",
        standing="re-implementation",
        settings={"order": "dlpm", "routing": "d2lpm"},
    ),
    Preset(
        name="larry_sal",
        summary="larry on every replica, sal between them (reconstruction)",
        source="Is the GPU Half-Empty or Half-Full?, arXiv 2410.17840: names and idea alone",
        standing="reconstruction",
        settings={
            "order": "larry",
            "admission": "slice_lease",
            "slicing": "adaptive",
            "routing": "sal",
        },
    ),
)

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {preset.name: preset for preset in _PRESETS}
)
"""Of one replica; a fleet can have them too."""
FLEET_PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {preset.name: preset for preset in _FLEET_PRESETS}
)
"""Those that say what happens between replicas."""


def find_preset(name: str, *, fleet: bool = False) -> Preset:
    """The preset of that name, for one replica or for a `fleet`. Raises ValueError with the nearest
    names."""
    known = {**PRESETS, **FLEET_PRESETS} if fleet else PRESETS
    if name in FLEET_PRESETS and not fleet:
        others = ", ".join(known)
        raise ValueError(f"preset: got {name!r}; allowed: {others}; {name} needs a fleet")
    if name not in known:
        raise ValueError(not_found("preset", name, known))
    return known[name]


def fill_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset of that name sets beside `given`. Raises ValueError for an unknown name, and
    for a fleet's."""
    return find_preset(name).fill(given)


def fill_fleet_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The same where there is a fleet."""
    return find_preset(name, fleet=True).fill(given, fleet=True)


def describe(preset: Preset) -> list[str]:
    """A preset in a few lines, for people."""
    parts = []
    for name, value in {**preset.settings, **preset.fleet}.items():
        parts += (
            [f"--{name}={each}" for each in value]
            if name.endswith(_OPTIONS)
            else [f"--{name}={value}"]
        )
    return [
        f"{preset.name}: {preset.summary}",
        f"  source: {preset.source} ({preset.standing})",
        f"  sets: {' '.join(parts) or '-'}",
    ]
