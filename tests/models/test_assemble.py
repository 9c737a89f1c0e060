"""Tensors made of rows: every value once, in any dtype, over any devices, in little memory."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.bench.load import measure, write_checkpoint
from jaxserve.models.assemble import assemble
from jaxserve.models.checkpoint import abstract_params
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_layout import ReadRows, decoder_tensors, hf_shapes
from jaxserve.models.partition import param_shardings, tensor_mesh

CONFIG = ModelConfig(
    name="uneven",
    num_layers=1,
    width=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=150,
    vocab_size=134,
    max_context=128,
    qkv_bias=True,
    qk_norm=True,
)


class Numbered:
    """Every value of every tensor is another number; told to be read in parts or not."""

    def __init__(self, dtype: str, *, splits: bool = True):
        self.splits = splits
        self.tensors = {}
        for number, (name, shape) in enumerate(hf_shapes(CONFIG).items()):
            values = np.arange(np.prod(shape)).reshape(shape) + 100_000 * number
            self.tensors[name] = values.astype(jnp.dtype(dtype))

    def open(self, name: str) -> ReadRows:
        return lambda start, stop: self.tensors[name][start:stop]


def test_every_value_arrives_once() -> None:
    source = Numbered("float32")
    made = [
        np.asarray(array).ravel()
        for _, array in assemble(
            decoder_tensors(CONFIG), abstract_params(CONFIG, dtype="float32"), source
        )
    ]
    wanted = [tensor.ravel() for tensor in source.tensors.values()]
    np.testing.assert_array_equal(np.sort(np.concatenate(made)), np.sort(np.concatenate(wanted)))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_mesh_and_a_device_get_what_a_cast_of_the_whole_gives(
    stored: str, dtype: str, splits: bool
) -> None:
    source = Numbered(stored, splits=splits)
    target = abstract_params(CONFIG, dtype=dtype)
    cut = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        target,
        param_shardings(tensor_mesh(2), target),
    )
    plan = list(decoder_tensors(CONFIG))
    for (path, whole), (_, shared) in zip(
        assemble(plan, target, source), assemble(plan, cut, source), strict=True
    ):
        assert whole.dtype == dtype and len(shared.sharding.device_set) == 2
        np.testing.assert_array_equal(whole, shared, err_msg=str(path))
        if path == ("head", "kernel"):
            wanted = source.tensors["lm_head.weight"].T.astype(jnp.dtype(dtype))
            np.testing.assert_array_equal(whole, wanted)


def test_an_error_of_the_source_is_the_assemblys() -> None:
    class Broken(Numbered):
        def open(self, name: str) -> ReadRows:
            raise OSError(name)

    target = abstract_params(CONFIG, dtype="float32")
    with pytest.raises(OSError, match="embed_tokens"):
        list(assemble(decoder_tensors(CONFIG), target, Broken("float32")))


def test_loading_holds_little_beside_the_weights(tmp_path: Path) -> None:
    config = ModelConfig(
        name="wide",
        num_layers=3,
        width=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=4096,
        vocab_size=20_000,
        max_context=128,
    )
    write_checkpoint(tmp_path, config)
    loading = measure(f"hf:{tmp_path}", "bfloat16", mesh="tp=2")
    assert loading.weight_bytes == 2 * config.num_parameters
    assert loading.beyond_bytes <= 2 * loading.largest_bytes
