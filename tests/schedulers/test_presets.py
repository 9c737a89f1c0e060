"""Presets: every one is a configuration, and what is chosen beside it wins."""

import pytest

from jaxserve.config import EngineConfig, PresetConfig, SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.schedulers.presets import PRESETS, describe, fill_preset


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


def test_presets_of_a_fleet_are_not_known() -> None:
    for name in ("scls", "scls_resident", "d2lpm", "preble", "llumnix", "larry_sal", "trail"):
        with pytest.raises(ConfigError, match=f"preset: got '{name}'; allowed: default, sls, ils"):
            PresetConfig(preset=name)
