"""Model directories: what is saved comes back, and what is not whole is refused in one line."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from tokenizers import Tokenizer

from jaxserve.errors import ConfigError
from jaxserve.models.checkpoint import abstract_params, load_config, load_state, save_model
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, Init
from jaxserve.models.sources import DEMO_DIRECTORY

CONFIG = ModelConfig(
    name="small",
    num_layers=2,
    width=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_width=48,
    vocab_size=64,
    max_context=128,
    eos_token_ids=(0,),
)


def params_of(config: ModelConfig, dtype: str = "bfloat16") -> dict:
    decoder = Decoder(config, init=Init(jnp.dtype(dtype), nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(decoder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    texts = {"tokenizer.json": b'{"version": "1.0"}'}
    save_model(directory, CONFIG, params_of(CONFIG), texts=texts)
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def assert_equal(got: dict, wanted: dict, dtype: str) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for leaf, stored in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, stored.astype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_come_back_in_the_dtype_asked_for(saved: Path, dtype: str) -> None:
    assert load_config(saved) == CONFIG
    assert_equal(load_state(saved, CONFIG, dtype=dtype), params_of(CONFIG), dtype)


def test_loaded_weights_make_a_decoder(saved: Path) -> None:
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(CONFIG, init=Init(jnp.dtype("float32")))))
    decoder = nnx.merge(graph, load_state(saved, CONFIG, dtype="float32"))
    assert decoder.layers[1].mlp.down.kernel[...].shape == (48, 32)


def test_weights_are_laid_out_by_one_sharding_or_by_a_tree_of_them(saved: Path) -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    tree = jax.tree.map(
        lambda leaf: split if leaf.ndim == 2 else replicated,
        abstract_params(CONFIG, dtype="float32"),
    )
    for sharding, wanted in ((replicated, replicated), (tree, split)):
        params = load_state(saved, CONFIG, dtype="float32", sharding=sharding)
        assert params["embedding"].sharding == wanted
        assert_equal(params, params_of(CONFIG), "float32")
    default = load_state(saved, CONFIG, dtype="float32")
    assert default["embedding"].sharding == SingleDeviceSharding(jax.devices()[0])


def test_saving_again_replaces_the_model_and_nothing_else(model: Path) -> None:
    (model / "README.md").write_text("kept")
    tied = dataclasses.replace(CONFIG, tied_embeddings=True)
    save_model(model, tied, params_of(tied, "float32"))
    assert_equal(load_state(model, tied, dtype="float32"), params_of(tied, "float32"), "float32")
    assert (model / "README.md").read_text() == "kept"
    assert not (model / "tokenizer.json").exists()


def test_params_of_another_shape_are_not_saved(tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, mlp_width=64)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down\.kernel: got shape \[48, 32\];"):
        save_model(tmp_path / "model", other, params_of(CONFIG))
    assert not (tmp_path / "model").exists()


def test_no_path_of_this_machine_is_stored(saved: Path) -> None:
    for path in saved.rglob("*"):
        assert not path.is_file() or str(saved.parent).encode() not in path.read_bytes(), path


def largest(model: Path) -> Path:
    files = (path for path in (model / "weights").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"got no file; wanted \d+ bytes"),
        (truncate, r"got \d+ bytes; wanted \d+"),
        (flip_a_bit, r"damaged: got digest \w+; wanted \w+"),
    ],
)
def test_any_damaged_weight_file_is_named(
    model: Path, damage: Callable[[Path], None], message: str
) -> None:
    listed = json.loads((model / "weights.json").read_text())["files"]
    assert largest(model).relative_to(model / "weights").as_posix() in listed
    for name in listed:
        path = model / "weights" / name
        whole = path.read_bytes()
        damage(path)
        with pytest.raises(ConfigError, match=message) as refusal:
            load_state(model, CONFIG, dtype="float32")
        assert str(refusal.value).startswith(f"{path}: ")
        assert "\n" not in str(refusal.value)
        path.write_bytes(whole)
    load_state(model, CONFIG, dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_width": 64}, r"mlp\.down\.kernel: got shape \[48, 32\]; wanted \[64, 32\]"),
        ({"tied_embeddings": True}, r"head\.kernel: got shape \[32, 64\]; wanted none"),
        ({"qkv_bias": True}, r"qkv\.bias: got none; wanted shape \[1, 4, 16\]"),
        ({"num_layers": 3}, r"layers\.2\..*: got none; wanted shape"),
    ],
)
def test_a_tensor_that_is_not_the_configurations_is_named(
    saved: Path, change: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_state(saved, dataclasses.replace(CONFIG, **change), dtype="float32")


def test_integer_tensors_are_no_weights(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    params["embedding"] = params["embedding"].astype(jnp.int8)
    with pytest.raises(ConfigError, match="embedding: got dtype int8; allowed: bfloat16, float16"):
        save_model(tmp_path / "model", CONFIG, params)


@pytest.mark.parametrize("name", ["config.json", "weights.json"])
def test_a_missing_or_damaged_description_is_named(model: Path, name: str) -> None:
    path = model / name
    whole = path.read_bytes()

    def load() -> None:
        load_state(model, load_config(model), dtype="float32")

    for content in (whole[: len(whole) // 2], b"[]", b"{}", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            load()
    path.unlink()
    with pytest.raises(ConfigError, match=f"{name}: No such file or directory; wanted a model"):
        load()


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere/config.json: No such file"):
        load_config(tmp_path / "nowhere")


def test_the_demo_model_is_small_and_whole() -> None:
    config = load_config(DEMO_DIRECTORY)
    assert config.num_parameters <= 5_500_000
    files = [path for path in DEMO_DIRECTORY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    params = load_state(DEMO_DIRECTORY, config, dtype="float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_parameters
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_the_demo_tokenizer_is_the_models() -> None:
    config = load_config(DEMO_DIRECTORY)
    tokenizer = Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.vocab_size
    assert config.eos_token_ids == (tokenizer.token_to_id("<|endoftext|>"),)
    for text in ("ROMEO:\nBut soft!\n\nJULIET:", "naïve 日本語 \U0001f600\t\r\n  x", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
