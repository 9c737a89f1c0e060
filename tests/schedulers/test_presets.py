"""Presets: every one is a configuration, and what is chosen beside it wins."""

import pytest

from jaxserve.config import EngineConfig, PresetConfig, SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.flag_table import SCHEDULING
from jaxserve.flags import parse
from jaxserve.schedulers.catalog import make_routing
from jaxserve.schedulers.policy import find, read_options
from jaxserve.schedulers.pool.catalog import POOLS
from jaxserve.schedulers.presets import PRESETS, describe, fill_fleet_preset, fill_preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name: str) -> None:
    filled = PRESETS[name].fill({})
    scheduler = SchedulerConfig(**filled)
    EngineConfig(scheduler=scheduler)
    changed = scheduler != SchedulerConfig()
    assert changed == bool(PRESETS[name].settings)
    for field, value in PRESETS[name].fill({}, fleet=True).items():
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


def test_presets_that_do_not_exist_yet_are_not_known() -> None:
    for name in ("preble", "llumnix", "trail"):
        with pytest.raises(ConfigError, match=f"preset: got '{name}'; allowed: default, sls, ils"):
            PresetConfig(preset=name)


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].only_fleet])
def test_a_fleets_preset_is_not_for_one_engine(name: str) -> None:
    with pytest.raises(ConfigError, match=f"preset: got '{name}'; .*; {name} is for several"):
        parse((SCHEDULING,), [f"--preset={name}"], environment={}, known=())
    filled = fill_fleet_preset(name, {})
    assert set(PRESETS[name].fleet) <= filled.keys()


def test_what_is_set_beside_a_fleets_preset_wins() -> None:
    own = {"pool": "scls", "pool_options": ("step=ab", "zeta=1")}
    assert fill_fleet_preset("scls", own) == {"pool_options": ("step=ab", "zeta=1")}
    assert fill_fleet_preset("d2lpm", {"routing": "random"}) == {"order": "dlpm"}


def test_sls_is_for_one_engine_and_for_fleets() -> None:
    assert "pool" not in fill_preset("sls", {})
    assert fill_fleet_preset("sls", {}) == {**fill_preset("sls", {}), "pool": "static"}


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].fleet])
def test_what_a_preset_sets_of_a_fleet_exists(name: str) -> None:
    filled = PRESETS[name].fleet
    if "pool" in filled:
        pool = find("pool", POOLS, filled["pool"])
        read_options("pool", pool.parameters, filled.get("pool_options", ()))
    if "routing" in filled:
        options = filled.get("routing_options", ())
        make_routing(filled["routing"], options, num_replicas=2, page_size=64)
