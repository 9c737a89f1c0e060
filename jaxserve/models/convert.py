"""From a Hugging Face directory to a model directory of ours, checked bit for bit.

The weights are held in host memory once while they are written. The check holds a few tensors:
each is read from the source again and compared with what the new directory gives back.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.assemble import assemble
from jaxserve.models.checkpoint import (
    CONFIG_FILE,
    MANIFEST_FILE,
    STORED_DTYPES,
    TEXT_FILES,
    abstract_params,
    load_config,
    restore,
    save_model,
)
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_files import HfFiles
from jaxserve.models.hf_layout import EMBEDDING, decoder_tensors, hf_shapes
from jaxserve.models.hf_layout import Path as TensorPath
from jaxserve.models.sources import ModelSource, load_model_config, load_weights

READING: Final = "reading"
WRITING: Final = "writing"
CHECKING: Final = "checking"

OnProgress = Callable[[str, int, int], None]
"""progress(stage, bytes done, bytes in all); of WRITING only the start and the end are told."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written, and how long each stage took."""

    dtype: str
    num_tensors: int
    num_bytes: int
    seconds: dict[str, float]


def convert(
    source: ModelSource, output: Path, *, dtype: str, progress: OnProgress = lambda *_: None
) -> Conversion:
    """Write the `hf:` model `source` to the directory `output`, and check what was written.

    `dtype` "auto" is the one that the source stores. Raises ConfigError for a source that cannot be
    served, an output that is something else than a model directory of ours, and a tensor that comes
    back other than it was read.
    """
    if source.kind != "hf":
        raise ConfigError(f"model: got {source.text!r}; allowed: hf:<directory>")
    config = load_model_config(source)
    dtype = _stored_dtype(source, config) if dtype == "auto" else dtype
    _check_output(output, num_bytes=config.num_parameters * jnp.dtype(dtype).itemsize)
    texts = _read_texts(source.directory)
    times = [time.monotonic()]
    weights = load_weights(
        source,
        config,
        dtype=dtype,
        seed=0,
        progress=lambda done, total: progress(READING, done, total),
    )
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    times.append(time.monotonic())
    progress(WRITING, 0, num_bytes)
    try:
        save_model(output, config, weights, texts=texts, compress=False)
        progress(WRITING, num_bytes, num_bytes)
        del weights
        times.append(time.monotonic())
        num_tensors = _check(source, config, output, dtype, progress)
    except BaseException as error:
        (output / MANIFEST_FILE).unlink(missing_ok=True)  # so that nobody serves it
        if isinstance(error, (OSError, ValueError)):  # the latter from orbax, of a full disk say
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"output: {str(output)!r} cannot be written: {reason}") from error
        raise
    times.append(time.monotonic())
    seconds = [stop - start for start, stop in zip(times, times[1:], strict=False)]
    stages = (READING, WRITING, CHECKING)
    return Conversion(dtype, num_tensors, num_bytes, dict(zip(stages, seconds, strict=True)))


def _check_output(output: Path, *, num_bytes: int) -> None:
    """Make the directory, unless it is there: empty or a model of ours, be it a half-written one.

    Raises ConfigError if it is anything else, or has no room for so many bytes.
    """
    wanted = "a new directory, an empty one, or one of our model directories"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            load_config(output)
        free_bytes = shutil.disk_usage(output).free
    except OSError as error:
        raise ConfigError(
            f"output: got {str(output)!r}: {error.strerror}; allowed: {wanted}"
        ) from error
    except ConfigError as error:
        raise ConfigError(
            f"output: got {str(output)!r}, which holds other files; allowed: {wanted}"
        ) from error
    if free_bytes < num_bytes:
        raise ConfigError(
            f"output: got {str(output)!r} with {free_bytes / 1e9:.2f} GB free; wanted"
            f" {num_bytes / 1e9:.2f} GB"
        )


def _stored_dtype(source: ModelSource, config: ModelConfig) -> str:
    """What config.json says, else what the embedding is stored in."""
    fields = json.loads((source.directory / CONFIG_FILE).read_text("utf-8"))
    said = fields.get("dtype") or fields.get("torch_dtype")
    if said in STORED_DTYPES:
        return said
    return HfFiles(source.directory, hf_shapes(config)).dtype(EMBEDDING).name


def _read_texts(directory: Path) -> dict[str, bytes]:
    texts = {}
    for name in TEXT_FILES:
        path = directory / name
        if path.exists():
            try:
                texts[name] = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from error
    return texts


def _check(
    source: ModelSource, config: ModelConfig, output: Path, dtype: str, progress: OnProgress
) -> int:
    """The number of tensors compared. Raises ConfigError at the first that differs."""
    target = abstract_params(config, dtype=dtype)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    num_tensors = done = 0
    progress(CHECKING, 0, total)
    with HfFiles(source.directory, hf_shapes(config)) as files:
        for path, wanted in assemble(decoder_tensors(config), target, files):
            got = _restore_one(output, path, target)
            if not np.array_equal(_bits(got), _bits(wanted)):
                name = ".".join(map(str, path))
                raise ConfigError(
                    f"{output}: tensor {name}: got other bits than were written; try another disk"
                )
            num_tensors += 1
            done += wanted.nbytes
            progress(CHECKING, done, total)
    return num_tensors


def _restore_one(directory: Path, path: TensorPath, target: Any) -> jax.Array:
    some: Any = target
    for key in path:
        some = some[key]
    for key in reversed(path):
        some = {key: some}
    got: Any = restore(directory, some)
    for key in path:
        got = got[key]
    return got


def _bits(array: jax.Array) -> np.ndarray:
    """The bits as integers: floats would call a NaN different from itself."""
    return np.asarray(array).view(f"u{array.dtype.itemsize}")
