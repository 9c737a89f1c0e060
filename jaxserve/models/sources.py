"""Where a model comes from: `demo`, `random:<shape>`, `orbax:<dir>`, `hf:<dir>`.

Importing it loads no JAX; loading weights does.

A model directory of ours (`orbax:`) holds config.json, weights/ and, if it speaks text,
tokenizer.json; one of Hugging Face's (`hf:`) config.json, safetensors files and the same.
"""

import difflib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.models.config import SHAPES, ModelConfig

DEMO_DIRECTORY = Path(__file__).parent / "demo"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A parsed `--model`. `kind` is random, orbax or hf; random weights have a `shape`, the others
    a `directory`."""

    text: str
    kind: str
    shape: ModelConfig | None = None
    directory: Path = Path()


def parse_source(text: str) -> ModelSource:
    """Raises ConfigError for a source that is unknown or a directory that is not there."""
    kind, _, value = text.partition(":")
    if text == "demo":
        return ModelSource(text, "orbax", directory=DEMO_DIRECTORY)
    if kind == "random":
        if value not in SHAPES:
            near = difflib.get_close_matches(value, SHAPES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"model: got {text!r}; allowed shapes: {', '.join(SHAPES)}{hint}")
        return ModelSource(text, kind, shape=SHAPES[value])
    if kind in ("orbax", "hf") and value:
        directory = Path(value)
        if not directory.is_dir():
            raise ConfigError(f"model: {text!r}: there is no directory {value!r}")
        return ModelSource(text, kind, directory=directory)
    raise ConfigError(
        f"model: got {text!r}; allowed: demo, random:<shape>, orbax:<directory>, hf:<directory>"
    )


def load_model_config(source: ModelSource) -> ModelConfig:
    """The model's shape. Raises ConfigError when its config.json is missing or damaged."""
    if source.shape is not None:
        return source.shape
    if source.kind == "hf":
        from jaxserve.models.hf_config import read_generation_fields, read_hf_config, token_ids

        config = read_hf_config(source.directory)
        eos = token_ids(read_generation_fields(source.directory).get("eos_token_id"))
        return replace(config, eos_token_ids=eos) if eos else config
    from jaxserve.models.checkpoint import load_config

    return load_config(source.directory)


def load_weights(
    source: ModelSource,
    config: ModelConfig,
    *,
    dtype: str,
    seed: int,
    mesh: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """The decoder's weights as a nested dict of arrays in `dtype`.

    With a `jax.sharding.Mesh` they are spread over its devices, else they go to the first one.
    `progress` hears of bytes done and in all, as they will lie in memory. Raises ConfigError for
    files that are missing, damaged or not what the configuration says.
    """
    import jax

    from jaxserve.models.assemble import assemble
    from jaxserve.models.checkpoint import abstract_params, load_state
    from jaxserve.models.hf_layout import decoder_tensors
    from jaxserve.models.partition import (
        loading_shardings,
        spread,
        spread_weight,
        weight_name,
    )

    target = abstract_params(config, dtype=dtype)
    if mesh is not None:
        target = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            target,
            loading_shardings(mesh, target),
        )
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    if source.kind == "orbax":
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        progress(0, total)
        weights = load_state(source.directory, config, dtype=dtype, sharding=shardings)
        progress(total, total)
        return weights if mesh is None else spread(mesh, config, weights)
    weights: dict[Any, Any] = {}
    done = 0
    progress(done, total)
    with open_tensors(source, config, seed=seed) as tensors:
        for path, array in assemble(decoder_tensors(config), target, tensors):
            if mesh is not None:
                array = spread_weight(mesh, config, weight_name(path), array)
            *outer, last = path
            place = weights
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = array
            done += array.nbytes
            progress(done, total)
    return weights


def open_tensors(source: ModelSource, config: ModelConfig, *, seed: int) -> Any:
    """A context with the `TensorSource` of an `hf:` or `random:` model."""
    if source.kind == "hf":
        from jaxserve.models.hf_files import HfFiles
        from jaxserve.models.hf_layout import hf_shapes

        return HfFiles(source.directory, hf_shapes(config))
    from jaxserve.models.random_weights import RandomTensors

    return nullcontext(RandomTensors(config, seed=seed))
