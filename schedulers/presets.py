"""Presets: policies and their options under one name, for one replica and for a fleet.

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
    """`settings` are values by name; what it leaves out keeps its default.

    `fleet` are settings of several replicas together (such as `routing` and `pool`), which a
    command for one engine does not have; `only_fleet`: it means nothing for one engine.
    """

    name: str
    summary: str
    source: str
    standing: Standing
    settings: Mapping[str, Any]
    fleet: Mapping[str, Any] = field(default_factory=dict)
    only_fleet: bool = False

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
        name="scls",
        summary="slices of padded batches, planned over a pool; recompute between slices"
        " (reconstruction in part)",
        source="Slice-Level Scheduling, arXiv 2406.13511",
        standing="reconstruction",
        settings={},
        fleet={"pool": "scls", "pool_options": ("step=lb",)},
        only_fleet=True,
    ),
    Preset(
        name="scls_resident",
        summary="slices planned over a pool; KV stays between slices and moves when worth it",
        source="-",
        standing="project rule",
        settings={},
        fleet={"pool": "scls_resident"},
        only_fleet=True,
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
    Preset(
        name="d2lpm",
        summary="dlpm on every replica, and credit by client and replica between them"
        " (reconstruction in part)",
        source="Locality-aware Fair Scheduling, arXiv 2501.14312, by two re-implementations",
        standing="re-implementation",
        settings={"order": "dlpm"},
        fleet={"routing": "d2lpm"},
        only_fleet=True,
    ),
    Preset(
        name="larry_sal",
        summary="larry on every replica, sal between them (reconstruction)",
        source="Is the GPU Half-Empty or Half-Full?, arXiv 2410.17840: names and idea alone",
        standing="reconstruction",
        settings={"order": "larry", "admission": "slice_lease", "slicing": "adaptive"},
        fleet={"routing": "sal"},
        only_fleet=True,
    ),
)

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {preset.name: preset for preset in _PRESETS}
)


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError with the nearest names."""
    if name not in PRESETS:
        raise ValueError(not_found("preset", name, PRESETS))
    return PRESETS[name]


def fill_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset of that name sets beside `given`, for one engine. Raises ValueError for an
    unknown name and for a preset that needs a fleet."""
    preset = find_preset(name)
    if preset.only_fleet:
        allowed = ", ".join(name for name, each in PRESETS.items() if not each.only_fleet)
        raise ValueError(
            f"preset: got {name!r}, which is for several replicas, and this command runs one"
            f" engine; allowed: {allowed}; to try it: jaxserve simulate --preset={name}"
        )
    return preset.fill(given)


def fill_fleet_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a command with several replicas: the settings of a fleet too."""
    return find_preset(name).fill(given, fleet=True)


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
