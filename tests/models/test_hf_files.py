"""Safetensors files: rows come back as written, and files that are not whole are refused."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import ConfigError
from jaxserve.models.hf_files import HfFiles

SHAPES = {"a": (5, 3), "b": (7,), "c": (4, 6)}


def tensors_in(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(jnp.dtype(dtype)) for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_any_rows_are_read_as_they_are_stored(dtype: str, tmp_path: Path) -> None:
    tensors = tensors_in(dtype)
    for file, names in (("one", "ab"), ("two", "c")):
        save_file({name: tensors[name] for name in names}, tmp_path / f"{file}.safetensors")
    place = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    with HfFiles(tmp_path, SHAPES) as files:
        for name, wanted in tensors.items():
            read = files.open(name)
            assert files.dtype(name) == dtype
            for start in range(len(wanted)):
                for stop in range(start, len(wanted) + 1):
                    got = read(start, stop)
                    assert got.dtype == wanted.dtype
                    np.testing.assert_array_equal(got, wanted[start:stop])


def test_tensors_that_nobody_wants_may_be_anything(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 2), np.int8), "b": np.ones(7)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="tensor b: got F64; allowed: BF16, F16, F32"):
        HfFiles(tmp_path, {"b": (7,)})
    with pytest.raises(ConfigError, match=r"tensor a: got shape \[2, 2\]; wanted \[2, 3\]"):
        HfFiles(tmp_path, {"a": (2, 3)})
    with HfFiles(tmp_path, {}):
        pass


def header(**tensors: dict) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(start: int, stop: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0\0",
        b"\xff" * 64,
        (1 << 60).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b"no header!" + bytes(16),
        header(a=entry(0, 16)) + bytes(15),
        header(a=entry(0, 16)) + bytes(17),
        header(a=entry(0, 16), b=entry(8, 24)) + bytes(24),
        header(a=entry(0, 16), b=entry(20, 36)) + bytes(36),
        header(a=entry(16, 32)) + bytes(16),
        header(a=entry(16, 0)) + bytes(16),
        header(a=entry(0, 8)) + bytes(8),
        header(a=entry(0, 16, shape=(1 << 62, 1 << 62))) + bytes(16),
        header(a=entry(0, 16, dtype="F31")) + bytes(16),
    ],
    ids=[
        "empty",
        "short",
        "garbage",
        "header past the end",
        "no JSON",
        "truncated",
        "longer than it says",
        "overlap",
        "hole",
        "out of range",
        "backwards",
        "fewer bytes than the shape",
        "overflow",
        "unknown dtype",
    ],
)
def test_a_file_that_is_not_whole_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*; try a fresh copy") as refusal:
        HfFiles(tmp_path, {"a": (4,)})
    assert str(refusal.value).startswith(str(path))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file(tensors_in("float32"), tmp_path / "model.safetensors")
    with HfFiles(tmp_path, SHAPES) as files:
        os.truncate(tmp_path / "model.safetensors", 100)
        with pytest.raises(ConfigError, match="it shrank while it was read"):
            files.open("c")(0, 4)


def test_an_index_that_names_the_wrong_file_is_refused(tmp_path: Path) -> None:
    save_file(tensors_in("float32"), tmp_path / "one.safetensors")
    place = {"weight_map": {"d": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(place))
    with pytest.raises(ConfigError, match=r"one\.safetensors: got no tensor 'd'"):
        HfFiles(tmp_path, {"d": (1,)})
