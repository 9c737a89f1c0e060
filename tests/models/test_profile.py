"""Profile files: what is written is read, what is damaged or of another model is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.config import KV_DTYPES
from jaxserve.engine.kernel_choice import KernelChoice
from jaxserve.errors import ConfigError
from jaxserve.models.computed_profile import compute_profile
from jaxserve.models.config import SHAPES
from jaxserve.models.profile import ModelShape, Profile, find_profile, profile_names
from jaxserve.models.sources import load_model_config, parse_source
from jaxserve.schedulers.estimators.roofline_time import DEVICES
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import SliceTime

SHAPE = SliceShape(8, 4, 2000, 128, 9000)


@pytest.fixture
def computed() -> Profile:
    return compute_profile(SHAPES["llama3-8b"], device="h200", num_devices=2, page_size=64)


def test_a_profile_comes_back_from_its_file(computed: Profile, write_profile, tmp_path) -> None:
    for number, profile in enumerate((computed, Profile.load(write_profile("tiny", step_s=0.01)))):
        path = tmp_path / f"{number}.json"
        profile.save(path)
        again = find_profile(str(path))
        assert again == profile and again.key == profile.key
        assert again.time.slice_s(SHAPE) == profile.time.slice_s(SHAPE) > 0


def test_a_changed_profile_changes_the_times_and_the_key(write_profile) -> None:
    path = Path(write_profile("tiny", step_s=0.01))
    before = find_profile(str(path))
    fields = json.loads(path.read_text())
    fields["time"]["step_s"]["seconds"] = [0.2]
    path.write_text(json.dumps(fields))
    after = find_profile(str(path))
    assert after.time.slice_s(SHAPE) > 10 * before.time.slice_s(SHAPE)
    assert after.key != before.key


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda fields: fields.update(schema="jaxserve.profile/0"), "schema is not"),
        (lambda fields: fields.update(kind="guessed"), "kind: got 'guessed'; allowed: measured, c"),
        (lambda fields: fields.pop("device"), "missing or unknown: device"),
        (lambda fields: fields["time"].update(dispatch_s=None), "time.dispatch_s: got None"),
        (lambda fields: fields["time"].update(attended_s=-1e-6), "time.attended_s: got -1e-06"),
        (lambda fields: fields["time"].update(color=1), "time: got"),
        (lambda fields: fields["bilinear"]["decode"].update(rows=float("nan")), "decode.rows: got"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    damage: Callable, wrong: str, write_profile, tmp_path
) -> None:
    path = Path(write_profile("tiny", step_s=0.01))
    fields = json.loads(path.read_text())
    damage(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=f"(?s)profile: got .*tiny.json.*{wrong}"):
        find_profile(str(path))


@pytest.mark.parametrize("text", ["", "[]", "7", "{}"])
def test_what_is_no_profile_is_refused(text: str, tmp_path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="other.json"):
        find_profile(str(path))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="got 'h300'; allowed: a JSON file .* h200-llama3-8b-bf1"):
        find_profile("h300")


def test_a_profile_of_another_shape_names_the_fields_that_differ(computed: Profile) -> None:
    computed.check_shape(SHAPES["llama3-8b"], dtype="bfloat16")
    renamed = dataclasses.replace(SHAPES["llama3-8b"], name="mine", max_context=4096)
    computed.check_shape(renamed)
    with pytest.raises(ConfigError, match="num_layers 32 .the model's: 80., width 4096"):
        computed.check_shape(SHAPES["llama3-70b"])
    with pytest.raises(ConfigError, match="precision bfloat16 .wanted: float32"):
        computed.check_shape(SHAPES["llama3-8b"], dtype="float32")


@pytest.mark.parametrize("name", profile_names())
def test_the_committed_profiles_are_whole(name: str) -> None:
    profile = find_profile(name)
    assert isinstance(profile.time, SliceTime)
    assert profile.num_pages is not None and profile.num_pages > 100
    source = "demo" if profile.model_name == "demo" else f"random:{profile.model_name}"
    profile.check_shape(load_model_config(parse_source(source)), dtype=profile.precision)
    assert 0 < profile.time.slice_s(SHAPE) < 10 and profile.time.host_s(SHAPE) > 0
    assert profile.bilinear.grows_with_length(most_rows=64, steps=128)
    measured = profile.kind == "measured"
    assert (profile.errors.held_out is not None) == measured == name.startswith("cpu")


@pytest.mark.parametrize("name", [name for name in profile_names() if name[:3] != "cpu"])
def test_the_computed_profiles_are_what_the_command_computes(name: str) -> None:
    kept = find_profile(name)
    again = compute_profile(
        SHAPES[kept.model_name],
        device=next(key for key, sheet in DEVICES.items() if sheet.kind == kept.device),
        num_devices=kept.num_devices,
        page_size=kept.page_size,
    )
    assert (again.time, again.num_pages, again.notes) == (kept.time, kept.num_pages, kept.notes)


def test_the_profile_of_the_14m_shape_is_as_good_as_the_design_asks() -> None:
    errors = find_profile("cpu-1core-llama-14m-f32").errors
    assert errors.held_out and errors.spread
    assert errors.held_out.mean <= errors.spread.mean + 0.03


def test_computed_profiles_follow_the_devices() -> None:
    def made(device: str, num_devices: int, model: str) -> Profile:
        return compute_profile(SHAPES[model], device=device, num_devices=num_devices, page_size=64)

    step = SliceShape(2, 1, 0, 0), SliceShape(1, 1, 0, 0)
    slow, fast = (made(device, 4, "llama3-8b") for device in ("v5e", "h200"))
    assert slow.time.slice_s(step[0]) > fast.time.slice_s(step[0])
    # A step of one row reads all weights but the embedding's: 15 GB over 4 x 819 GB/s at 85 %.
    step_s = slow.time.slice_s(step[0]) - slow.time.slice_s(step[1])
    assert 15e9 / (4 * 819e9 * 0.85) < step_s < 1.2 * 15e9 / (4 * 819e9 * 0.85)
    pages = fast.num_pages or 0
    kv_bytes = pages * 64 * SHAPES["llama3-8b"].kv_bytes_per_token(2)
    assert kv_bytes + 2 * SHAPES["llama3-8b"].num_parameters < 4 * 141e9
    assert "held 2 times" in " ".join(made("v5e", 16, "llama3-70b").notes)
    with pytest.raises(ConfigError, match="tp=8, whose 128 GB leave nothing beside 141 GB"):
        made("v5e", 8, "llama3-70b")
    with pytest.raises(
        ConfigError, match="device: got 'h300'; allowed: h200, h100, a100, v5e, v5p, v6e"
    ):
        made("h300", 1, "llama3-8b")


def test_every_shape_field_is_one_of_the_models() -> None:
    for config in SHAPES.values():
        assert ModelShape.of(config).sizes("float32").value_bytes == 4


@pytest.mark.parametrize("kv_dtype", [name for name in KV_DTYPES if name != "auto"])
@pytest.mark.parametrize("shape", ["tiny", "llama3-8b"])
def test_a_cached_token_takes_what_its_pages_do(shape: str, kv_dtype: str) -> None:
    """Scales included; the weights stay as they are."""
    model, page_size = SHAPES[shape], 64
    sizes = ModelShape.of(model).sizes("bfloat16", kv_dtype)
    chosen = KernelChoice("pallas_gpu", "gpu", kv_dtype)
    assert sizes.kv_bytes_per_token == chosen.bytes_per_token(model, page_size)
    assert sizes.weight_bytes == ModelShape.of(model).sizes("bfloat16").weight_bytes


def test_a_computed_profile_counts_the_type_of_its_pages_and_is_read_back(tmp_path) -> None:
    def made(kv_dtype: str) -> Profile:
        return compute_profile(
            SHAPES["llama3-8b"], device="h200", num_devices=1, page_size=64, kv_dtype=kv_dtype
        )

    wide, narrow = made("auto"), made("int8")
    assert made("bfloat16").time == wide.time
    assert narrow.num_pages and wide.num_pages
    assert narrow.num_pages / wide.num_pages == pytest.approx(2 * 128 / (128 + 4), rel=1e-3)
    long = SliceShape(16, 64, 64 * 16 * 8192, 0)
    assert narrow.time.slice_s(long) < 0.7 * wide.time.slice_s(long)
    narrow.save(tmp_path / "narrow.json")
    assert Profile.load(tmp_path / "narrow.json") == narrow
