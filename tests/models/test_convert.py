"""Conversion: what is written loads as the source does, is checked, and replaces no other files."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from jaxserve import launch
from jaxserve.errors import ConfigError
from jaxserve.models.checkpoint import load_config, save_model
from jaxserve.models.config import ModelConfig
from jaxserve.models.convert import CHECKING, WRITING, convert
from jaxserve.models.hf_config import read_hf_config
from jaxserve.models.hf_layout import hf_shapes
from jaxserve.models.partition import partition_specs, tensor_mesh
from jaxserve.models.random_weights import family_tensor
from jaxserve.models.sources import load_model_config, load_weights, parse_source

FIXTURES = Path(__file__).parent / "families"
TEXTS = {
    "tokenizer.json": '{"not": "parsed"}',
    "tokenizer_config.json": "{ }",
    "chat_template.jinja": "{{ messages }}\r\n",
    "generation_config.json": '{"eos_token_id": [3, 5]}',
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def write_source(directory: Path, name: str = "qwen2", **fields: object) -> Path:
    """A model in bfloat16 whose config.json says `fields` as well."""
    directory.mkdir()
    config = json.loads((FIXTURES / name / "config.json").read_text()) | {"dtype": None} | fields
    (directory / "config.json").write_text(json.dumps(config))
    for text, content in TEXTS.items():
        (directory / text).write_bytes(content.encode())
    tensors = {
        key: family_tensor(key, shape).astype(jnp.bfloat16)
        for key, shape in hf_shapes(read_hf_config(directory)).items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def hf(directory: Path):
    return parse_source(f"hf:{directory}")


def load(text: str, dtype: str, num_devices: int):
    source = parse_source(text)
    config = load_model_config(source)
    return load_weights(source, config, dtype=dtype, seed=0, mesh=tensor_mesh(num_devices))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_converted_model_loads_onto_a_mesh_as_its_source_does(
    dtype: str, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    done = convert(hf(source), output, dtype=dtype)
    stored = "bfloat16" if dtype == "auto" else dtype
    wanted = load(f"hf:{source}", stored, 2)
    got = load(f"orbax:{output}", stored, 2)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
        np.testing.assert_array_equal(one, other)
    leaves = jax.tree.leaves(wanted)
    assert (done.dtype, done.num_tensors) == (stored, len(leaves))
    assert done.num_bytes == sum(leaf.nbytes for leaf in leaves)
    assert load_config(output) == dataclasses.replace(read_hf_config(source), eos_token_ids=(3, 5))


def test_texts_are_copied_as_they_are(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    convert(hf(source), output, dtype="auto")
    (source / "chat_template.jinja").unlink()
    for name, content in TEXTS.items():
        assert (output / name).read_bytes() == content.encode()
    convert(hf(source), output, dtype="auto")
    assert not (output / "chat_template.jinja").exists()


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_configurations_dtype_goes_before_that_of_the_files(field: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", **{field: "float32"})
    assert convert(hf(source), tmp_path / "output", dtype="auto").dtype == "float32"


@pytest.mark.parametrize("stage", [WRITING, CHECKING])
def test_an_interrupted_conversion_is_no_model(stage: str, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    convert(hf(source), output, dtype="float32")

    def interrupt(at: str, done: int, total: int) -> None:
        if at == stage and done == (total if stage == WRITING else 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf(source), output, dtype="auto", progress=interrupt)
    with pytest.raises(ConfigError, match=r"weights\.json: No such file"):
        load(f"orbax:{output}", "float32", 1)
    convert(hf(source), output, dtype="auto")
    load(f"orbax:{output}", "float32", 1)


def test_what_the_disk_spoils_is_found(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"

    def spoil(stage: str, done: int, total: int) -> None:
        if (stage, done) == (CHECKING, 0):
            files = [path for path in (output / "weights").rglob("d/*") if path.is_file()]
            largest = max(files, key=lambda path: path.stat().st_size)
            content = bytearray(largest.read_bytes())
            content[len(content) // 3] ^= 1
            largest.write_bytes(content)

    with pytest.raises(ConfigError, match=r"output: tensor \S+: got other bits than were written"):
        convert(hf(source), output, dtype="auto", progress=spoil)
    assert not (output / "weights.json").exists()


def test_other_files_are_never_replaced(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    for output in (other, source, other / "letter.txt"):
        with pytest.raises(ConfigError, match=r"output: got .*; allowed: a new directory, an empt"):
            convert(hf(source), output, dtype="auto")
    assert [path.name for path in other.iterdir()] == ["letter.txt"]


def test_the_command_says_what_it_did(source: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "output"
    assert launch.main(["convert", f"--model=hf:{source}", f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert "tensors" in said and "in bfloat16, read back and equal bit for bit" in said
    assert f"jaxserve serve --model=orbax:{output}" in said
    load(f"orbax:{output}", "float32", 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=demo", "--output=x"], "model: got 'demo'; allowed: hf:<directory>"),
        (["--model=hf:nowhere", "--output=x"], "there is no directory 'nowhere'"),
        (["--model=hf:nowhere"], "output: got ''; allowed: a directory"),
        (["--model=hf:nowhere", "--output=x", "--dtype=int8"], "dtype"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], message: str, capsys) -> None:
    assert launch.main(["convert", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_large_tensor_lies_in_chunks_along_the_axis_that_a_mesh_cuts(tmp_path: Path) -> None:
    config = ModelConfig(
        name="wide",
        num_layers=1,
        width=512,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        mlp_width=2048,
        vocab_size=4096,
        max_context=128,
    )
    source = parse_source("random:tiny")
    source = dataclasses.replace(source, shape=config)
    params = load_weights(source, config, dtype="bfloat16", seed=0)
    save_model(tmp_path, config, params, compress=False)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(tmp_path.resolve() / "weights").item_metadata.tree
    layer, specs = stored["layers"]["0"], partition_specs(params)
    for found, spec in (
        (stored["embedding"], specs["embedding"]),
        (stored["head"]["kernel"], specs["head"]["kernel"]),
        (layer["attention"]["qkv"]["kernel"], specs["layers"][0]["attention"]["qkv"]["kernel"]),
        (layer["mlp"]["gate_up"]["kernel"], specs["layers"][0]["mlp"]["gate_up"]["kernel"]),
        (layer["mlp"]["down"]["kernel"], specs["layers"][0]["mlp"]["down"]["kernel"]),
    ):
        (axis,) = (axis for axis, cut in enumerate(spec) if cut is not None)
        assert found.shape[axis] // 2 % found.storage.chunk_shape[axis] == 0, found
