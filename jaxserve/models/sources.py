"""Where a model comes from: `demo`, `random:<shape>`, `orbax:<dir>`.

Importing it loads no JAX; loading weights does.

A model directory holds config.json, weights/ and, if it speaks text, tokenizer.json.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.models.config import SHAPES, ModelConfig

DEMO_DIRECTORY = Path(__file__).parent / "demo"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A parsed `--model`: a directory, or (`directory` None) random weights of a named shape."""

    text: str
    shape: ModelConfig | None = None
    directory: Path | None = None


def parse_source(text: str) -> ModelSource:
    """Raises ConfigError for a source that is unknown or a directory that is not there."""
    kind, _, value = text.partition(":")
    if text == "demo":
        return ModelSource(text, directory=DEMO_DIRECTORY)
    if kind == "random":
        if value not in SHAPES:
            near = difflib.get_close_matches(value, SHAPES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"model: got {text!r}; allowed shapes: {', '.join(SHAPES)}{hint}")
        return ModelSource(text, shape=SHAPES[value])
    if kind == "orbax" and value:
        directory = Path(value)
        if not directory.is_dir():
            raise ConfigError(f"model: {text!r}: there is no directory {value!r}")
        return ModelSource(text, directory=directory)
    raise ConfigError(f"model: got {text!r}; allowed: demo, random:<shape>, orbax:<directory>")


def tokenizer_path(text: str) -> Path | None:
    """The tokenizer.json of a source; None when it serves token ids only."""
    directory = parse_source(text).directory
    if directory is None:
        return None
    path = directory / "tokenizer.json"
    return path if path.exists() else None


def load_model_config(source: ModelSource) -> ModelConfig:
    """The model's shape. Raises ConfigError when its config.json is missing or damaged."""
    if source.shape is not None:
        return source.shape
    from jaxserve.models.checkpoint import load_config

    assert source.directory is not None
    return load_config(source.directory)


def load_weights(
    source: ModelSource, config: ModelConfig, *, dtype: str, seed: int, mesh: Any = None
) -> Any:
    """The decoder's weights as a nested dict of arrays in `dtype`.

    With a `jax.sharding.Mesh` they are cut over its devices, else they go to the first one.
    """
    import jax
    import jax.numpy as jnp

    from jaxserve.models.checkpoint import abstract_params, load_state
    from jaxserve.models.hf_layout import decoder_weights
    from jaxserve.models.partition import param_shardings

    shardings = mesh and param_shardings(mesh, abstract_params(config, dtype=dtype))
    if source.directory is not None:
        return load_state(source.directory, config, dtype=dtype, sharding=shardings)
    from jaxserve.models.random_weights import hf_shapes, hf_tensor

    shapes = hf_shapes(config)
    host = decoder_weights(config, lambda name: hf_tensor(name, shapes[name], seed=seed))
    if shardings is None:
        return jax.tree.map(lambda array: jnp.asarray(array, dtype), host)
    return jax.tree.map(
        lambda array, where: jax.device_put(array.astype(jnp.dtype(dtype)), where), host, shardings
    )
