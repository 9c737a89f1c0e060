"""Presets: every one is a configuration, and what is chosen beside it wins."""

import pytest

from jaxserve.config import EngineConfig, PresetConfig, SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.schedulers.catalog import make_routing
from jaxserve.schedulers.policy import find, read_options
from jaxserve.schedulers.pool.catalog import POOLS
from jaxserve.schedulers.presets import (
    FLEET_PRESETS,
    PRESETS,
    describe,
    fill_fleet_preset,
    fill_preset,
)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name: str) -> None:
    filled = fill_preset(name, {})
    scheduler = SchedulerConfig(**filled)
    EngineConfig(scheduler=scheduler)
    assert (scheduler == SchedulerConfig()) == (name == "default")
    for field, value in filled.items():
        assert f"--{field}=" in " ".join(describe(PRESETS[name])) or not value


def test_options_go_with_their_policy() -> None:
    assert fill_preset("vtc", {}) == {"order": "vtc", "order_options": ("price_cached=1",)}
    assert fill_preset("vtc", {"order": "fcfs"}) == {}
    own = {"order": "vtc", "order_options": ("w_out=3",)}
    assert fill_preset("vtc", own) == {"order_options": ("price_cached=1", "w_out=3")}
    assert fill_preset("vtc", {"order_options": ("price_cached=0",)}) == {
        "order": "vtc",
        "order_options": ("price_cached=0",),
    }


@pytest.mark.parametrize("name", FLEET_PRESETS)
def test_a_fleets_preset_says_who_runs_what_beside_what_its_replicas_do(name: str) -> None:
    filled = fill_fleet_preset(name, {})
    kind = "pool" if "pool" in filled else "routing"
    policy, options = filled.pop(kind), filled.pop(f"{kind}_options", ())
    if kind == "routing":
        make_routing(policy, options, num_replicas=2, page_size=64)
    else:
        read_options("pool", find("pool", POOLS, policy), options)
    EngineConfig(scheduler=SchedulerConfig(**filled))
    assert fill_fleet_preset(name, {kind: "random"}) == filled
    with pytest.raises(ConfigError, match=f"got '{name}'; .*; {name} needs a fleet"):
        PresetConfig(preset=name)
    assert fill_fleet_preset("vtc", {}) == fill_preset("vtc", {})


def test_sls_plans_a_pool_where_there_is_a_fleet() -> None:
    assert "pool" not in fill_preset("sls", {})
    assert fill_fleet_preset("sls", {}) == {**fill_preset("sls", {}), "pool": "static"}


def test_presets_of_a_fleet_are_not_known() -> None:
    for name in ("scls", "scls_resident", "d2lpm", "preble", "llumnix", "larry_sal", "trail"):
        with pytest.raises(ConfigError, match=f"preset: got '{name}'; allowed: default, sls, ils"):
            PresetConfig(preset=name)
