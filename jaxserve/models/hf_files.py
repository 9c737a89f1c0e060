"""The tensors of a Hugging Face directory: safetensors files, one or several with an index.

Every tensor is checked against the shapes that the configuration asks for before any is read, so
that nothing is half-loaded. Pickle files (.bin, .pt) are refused: loading one runs its code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ConfigError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
DTYPES: Final = ("BF16", "F16", "F32")

_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.pkl")


class HfFiles:
    """Open files of one directory. Raises ConfigError naming file, tensor, got and wanted.

    `wanted` gives the shape of every tensor the model needs; others are not read. Files are mapped
    into memory: a tensor costs memory while it is used.
    """

    def __init__(self, directory: Path, wanted: Mapping[str, tuple[int, ...]]):
        place = _places(directory)
        missing = sorted(wanted.keys() - place.keys())
        if missing:
            raise ConfigError(
                f"{directory}: got no tensor {missing[0]!r} ({len(missing)} missing); wanted shape"
                f" {list(wanted[missing[0]])}, by config.json"
            )
        self._open: dict[Path, Any] = {}
        self._place = {name: place[name] for name in wanted}
        for name, shape in wanted.items():
            self._check(name, shape)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype it is stored in."""
        return self._file(self._place[name]).get_tensor(name)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path}: {error}; try a fresh copy of the model") from error
        return self._open[path]

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        path = self._place[name]
        file = self._file(path)
        if name not in file.keys():  # noqa: SIM118 - safe_open is no mapping
            raise ConfigError(f"{path}: got no tensor {name!r}; {INDEX_FILE} says it is there")
        stored = file.get_slice(name)
        got = tuple(stored.get_shape())
        if got != shape:
            raise ConfigError(
                f"{path}: tensor {name}: got shape {list(got)}; wanted {list(shape)}, by"
                " config.json"
            )
        if stored.get_dtype() not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise ConfigError(
                f"{path}: tensor {name}: got {stored.get_dtype()}; allowed: {allowed}"
            )


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
        try:
            with safe_open(single, framework="numpy") as file:
                return dict.fromkeys(file.keys(), single)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{single}: {error}; try a fresh copy of the model") from error
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    hint = f"; {pickles[0]} is a pickle, which is refused" if pickles else ""
    raise ConfigError(f"{directory}: got no {SINGLE_FILE} and no {INDEX_FILE}{hint}")
