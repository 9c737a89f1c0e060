"""The tensors of a Hugging Face directory: safetensors files, one or several with an index.

Every tensor is checked against the shapes that the configuration asks for before any is read, so
that nothing is half-loaded. Pickle files (.bin, .pt) are refused: loading one runs its code.

Rows are read into memory of their own rather than mapped: mapped pages count as resident until
somebody lets go of them, and a file that shrinks under a mapping ends the process.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ConfigError
from jaxserve.models.hf_layout import ReadRows

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
DTYPES: Final = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}

_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.pkl")
_REMEDY: Final = "try a fresh copy of the model"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: its bytes, row by row, from `offset` of `path` on."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class HfFiles:
    """Files of one directory, open for reading in a `with` block. Its `open` is safe in threads.

    `wanted` gives the shape of every tensor the model needs; others are not read. Raises
    ConfigError naming file, tensor, got and wanted.
    """

    splits = True  # reading some rows of a tensor costs no more than those rows

    def __init__(self, directory: Path, wanted: Mapping[str, tuple[int, ...]]):
        place = _places(directory)
        missing = sorted(wanted.keys() - place.keys())
        if missing:
            raise ConfigError(
                f"{directory}: got no tensor {missing[0]!r} ({len(missing)} missing); wanted shape"
                f" {list(wanted[missing[0]])}, by config.json"
            )
        headers = {path: read_header(path) for path in sorted({place[name] for name in wanted})}
        self._stored = {
            name: _checked(headers[place[name]], place[name], name, shape)
            for name, shape in wanted.items()
        }
        self._stack = ExitStack()
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> "HfFiles":
        for path in {stored.path for stored in self._stored.values()}:
            self._files[path] = self._stack.enter_context(path.open("rb", buffering=0))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def dtype(self, name: str) -> np.dtype:
        """What a tensor is stored in."""
        return DTYPES[self._stored[name].dtype]

    def open(self, name: str) -> ReadRows:
        """read(start, stop) -> those rows, in the dtype they are stored in."""
        return partial(self._read, self._stored[name])

    def _read(self, stored: StoredTensor, start: int, stop: int) -> np.ndarray:
        dtype = DTYPES[stored.dtype]
        row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
        buffer = np.empty((stop - start) * row_bytes, np.uint8)
        _fill(self._files[stored.path], stored.offset + start * row_bytes, buffer, stored.path)
        return buffer.view(dtype).reshape(-1, *stored.shape[1:])


def _fill(file: BinaryIO, offset: int, buffer: np.ndarray, path: Path) -> None:
    done = 0
    while done < buffer.size:
        try:
            got = os.preadv(file.fileno(), [buffer.data[done:]], offset + done)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; {_REMEDY}") from error
        if not got:
            raise ConfigError(f"{path}: it shrank while it was read; {_REMEDY}")
        done += got


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file. Raises ConfigError for a file that is not whole.

    The file starts with the length of its header (8 bytes) and the header, in JSON.
    """
    try:
        # Its check is thorough: names, dtypes, and offsets that cover the file without overlap.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            fields = json.loads(file.read(size))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; {_REMEDY}") from error
    fields.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, 8 + size + tensor["data_offsets"][0], tuple(tensor["shape"]), tensor["dtype"]
        )
        for name, tensor in fields.items()
    }


def _checked(
    header: Mapping[str, StoredTensor], path: Path, name: str, shape: tuple[int, ...]
) -> StoredTensor:
    if name not in header:
        raise ConfigError(f"{path}: got no tensor {name!r}; {INDEX_FILE} says it is there")
    stored = header[name]
    if stored.shape != shape:
        raise ConfigError(
            f"{path}: tensor {name}: got shape {list(stored.shape)}; wanted {list(shape)}, by"
            " config.json"
        )
    if stored.dtype not in DTYPES:
        raise ConfigError(
            f"{path}: tensor {name}: got {stored.dtype}; allowed: {', '.join(DTYPES)}"
        )
    return stored


def _places(directory: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = directory / INDEX_FILE
    if index.exists():
        try:
            files = json.loads(index.read_text("utf-8"))["weight_map"]
            return {name: directory / Path(file).name for name, file in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: damaged: {error!r}") from error
    single = directory / SINGLE_FILE
    if single.exists():
        return dict.fromkeys(read_header(single), single)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    hint = f"; {pickles[0]} is a pickle, which is refused" if pickles else ""
    raise ConfigError(f"{directory}: got no {SINGLE_FILE} and no {INDEX_FILE}{hint}")
