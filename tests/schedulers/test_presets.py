"""Presets: every one is a configuration, and what is chosen beside it wins."""

import pytest

from jaxserve.config import EngineConfig, PresetConfig, SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.flag_table import SCHEDULING
from jaxserve.flags import parse
from jaxserve.schedulers.catalog import choose
from jaxserve.schedulers.pool.catalog import POOLS
from jaxserve.schedulers.presets import PRESETS, describe, fill_fleet_preset, fill_preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name: str) -> None:
    filled = PRESETS[name].fill({})
    scheduler = SchedulerConfig(**filled)
    EngineConfig(scheduler=scheduler)
    changed = scheduler != SchedulerConfig()
    assert changed != (name == "default" or PRESETS[name].only_fleet)
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


@pytest.mark.parametrize("name", ["scls", "scls_resident"])
def test_a_preset_of_a_pool_is_for_fleets(name: str) -> None:
    with pytest.raises(ConfigError, match=f"preset: got '{name}'; .*, for {name} plans over"):
        parse((SCHEDULING,), [f"--preset={name}"], environment={}, known=())
    assert fill_fleet_preset(name, {})["pool"] == name
    own = {"pool": "scls", "pool_options": ("step=ab", "zeta=1")}
    assert fill_fleet_preset("scls", own) == {"pool_options": ("step=ab", "zeta=1")}


def test_sls_is_for_one_engine_and_for_fleets() -> None:
    assert "pool" not in fill_preset("sls", {})
    assert fill_fleet_preset("sls", {}) == {**fill_preset("sls", {}), "pool": "static"}


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].fleet])
def test_the_pool_of_a_preset_is_a_planner(name: str) -> None:
    filled = PRESETS[name].fleet
    choose("pool", POOLS, filled["pool"], filled.get("pool_options", ()))
