"""Each family against transformers: logits, and greedy continuations through the whole engine.

The fixtures hold what transformers computed (scripts/make_family_fixtures); the weights are drawn
here, written as safetensors and loaded as `hf:` models are.
"""

import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxserve.config import SchedulerConfig
from jaxserve.engine.batch import BatchShape
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.compile_count import CompileCount
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.devices import open_mesh
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, Init, causal_attention
from jaxserve.models.hf_config import FAMILIES, read_hf_config
from jaxserve.models.hf_layout import hf_shapes
from jaxserve.models.random_weights import family_tensor
from jaxserve.models.sources import load_model_config, load_weights, parse_source
from jaxserve.request import Limits, Request, SamplingParams

FIXTURES = Path(__file__).parent / "families"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
MOST_ERROR = 2e-4


def write_model(directory: Path, name: str, *, num_files: int = 1) -> Path:
    """A Hugging Face directory with the weights that fixture `name` was made with."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    shapes = hf_shapes(read_hf_config(directory))
    tensors = {key: family_tensor(key, shape) for key, shape in shapes.items()}
    if num_files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    place = {}
    for part in range(num_files):
        file = f"model-{part + 1:05}-of-{num_files:05}.safetensors"
        some = {key: tensors[key] for key in sorted(tensors)[part::num_files]}
        save_file(some, directory / file)
        place |= dict.fromkeys(some, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source = parse_source(f"hf:{write_model(tmp_path, name)}")
    config = load_model_config(source)
    weights = load_weights(source, config, dtype="float32", seed=0)
    expected = np.load(FIXTURES / name / "expected.npz")
    decoder = Decoder(config, init=Init(jnp.float32))
    nnx.update(decoder, nnx.State(weights))
    token_1T = jnp.asarray(expected["prompt"])[None]
    position_1T = jnp.arange(token_1T.size, dtype=jnp.int32)[None]
    hidden_1TD, _ = decoder(token_1T, position_1T, causal_attention(config), None)
    got = decoder.logits(hidden_1TD)[0, -len(expected["logits"]) :]
    assert np.abs(got - expected["logits"]).max() <= MOST_ERROR


@pytest.mark.parametrize(
    ("name", "mesh"), [*((name, "tp=2") for name in NAMES), ("mistral", "tp=1"), ("qwen3", "tp=1")]
)
def test_the_engine_continues_as_transformers_does(name: str, mesh: str, tmp_path: Path) -> None:
    """Prompts in two chunks, decoding in slices of 16 steps, pages of 16 tokens."""
    source = parse_source(f"hf:{write_model(tmp_path, name, num_files=2)}")
    config = load_model_config(source)
    expected = np.load(FIXTURES / name / "expected.npz")
    wanted = expected["continuation"].tolist()
    assert continue_prompt(source, config, mesh, expected["prompt"], len(wanted)) == wanted


def continue_prompt(source, config: ModelConfig, mesh: str, prompt: np.ndarray, num_tokens: int):
    devices = open_mesh(mesh, config)
    executor = JaxExecutor(
        config,
        load_weights(source, config, dtype="float32", seed=0, mesh=devices),
        mesh=devices,
        shape=BatchShape(tile=32, table_pages=16, step_buffer=16, max_rows=1),
        buckets=(Bucket(1, 0), Bucket(1, 1)),
        num_pages=16,
        page_size=16,
        kernels="auto",
        dtype="float32",
    )
    executor.compile_all(lambda _: None, threads=2)
    count = CompileCount()
    count.start_serving()
    core = EngineCore(
        CoreConfig(
            limits=Limits(config.vocab_size, config.max_context, max_samples=1),
            model_key=config.name,
            num_pages=16,
            page_size=16,
            prefix_cache=False,
            tile=32,
            scheduler=SchedulerConfig(
                slicing="fixed", slice_steps=16, max_rows=1, max_prefill_tokens=32
            ),
        )
    )
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, seed=0)
    core.submit(Request(request_id="one", prompt=prompt, params=params), time.monotonic())
    made: list[int] = []
    while not core.idle:
        plan = core.next_slice(time.monotonic())
        if plan is not None:
            core.complete(executor.wait(executor.dispatch(plan)), time.monotonic())
            for delta in core.take_deltas():
                made += delta.tokens
    assert count.compiles().serving == 0, "something was not compiled at warm-up"
    return made


def test_every_family_has_a_fixture() -> None:
    seen = {
        json.loads((FIXTURES / n / "config.json").read_text())["architectures"][0] for n in NAMES
    }
    assert seen == FAMILIES.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures: got .*GPT2.*; allowed: one of Ll",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'; allowed: 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: got 'yarn'; allowed: default"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: got .*; allowed: 'full",
        ),
        ({"attention_bias": True}, "attention_bias: got True; allowed: False"),
        ({"hidden_size": None}, "config.json: "),
        ({"num_key_value_heads": 3}, "num_heads: got 4; allowed: a multiple of num_kv_heads"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(
    change: dict, message: str, tmp_path: Path
) -> None:
    fields = json.loads((FIXTURES / "llama2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ConfigError, match=message):
        read_hf_config(tmp_path)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    fields = json.loads((FIXTURES / "llama2" / "config.json").read_text())
    del fields["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"config\.json: intermediate_size: missing"):
        read_hf_config(tmp_path)


def load(directory: Path):
    source = parse_source(f"hf:{directory}")
    return load_weights(source, load_model_config(source), dtype="float32", seed=0)


def test_bfloat16_files_are_read(tmp_path: Path) -> None:
    write_model(tmp_path, "llama2")
    shapes = hf_shapes(read_hf_config(tmp_path))
    rounded = {key: family_tensor(key, shapes[key]).astype(jnp.bfloat16) for key in shapes}
    save_file(rounded, tmp_path / "model.safetensors")
    got = load(tmp_path)["layers"][2]["mlp"]["down"]["kernel"]
    want = rounded["model.layers.2.mlp.down_proj.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(got, want)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path, "llama2", num_files=2) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors"):
        load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama2") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*try a fresh copy"):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, "llama2")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"intermediate_size": 128}))
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.gate_proj\.weight: got shape \[160, 64\]; wanted \[128"
    ):
        load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, "llama2")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match=r"got no tensor 'model\.layers\.3\..* \(9 missing\)"):
        load(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "llama2")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle, which is refused"):
        load(tmp_path)
