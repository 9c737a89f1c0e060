"""Random weights by Hugging Face names: the same numbers in every engine that can load them.

Each tensor is drawn from its own generator, seeded by its name, so that a loader may draw them in
any order, or only some of them. numpy only.
"""

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_layout import ReadRows, hf_shapes

INIT_STD = 0.02


def hf_tensor(name: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """One tensor in float32: ones for norms, zeros for biases, N(0, 0.02) for the rest."""
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng([seed, *name.encode()])
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(INIT_STD)


class RandomTensors:
    """The tensors of `hf_tensor` as a source to load from."""

    splits = False  # a tensor is drawn as a whole

    def __init__(self, config: ModelConfig, *, seed: int):
        self._shapes = hf_shapes(config)
        self._seed = seed

    def open(self, name: str) -> ReadRows:
        """read(start, stop) -> those rows, in float32. Draws the tensor."""
        tensor = hf_tensor(name, self._shapes[name], seed=self._seed)
        return lambda start, stop: tensor[start:stop]


def hf_state_dict(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """All weights of a random model, float32, by their Hugging Face names."""
    return {name: hf_tensor(name, shape, seed=seed) for name, shape in hf_shapes(config).items()}


def family_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of the small models that families are checked with: float32, by its HF name.

    Larger than a model starts with, and norms and biases vary, so that every part shows in the
    logits.
    """
    rng = np.random.default_rng([7, *name.encode()])
    draw = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.2) * draw
    return draw * np.float32(0.5 if name.endswith(".bias") else 0.15)
