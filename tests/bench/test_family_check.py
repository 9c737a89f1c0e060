"""A Hugging Face directory, served whole: curl, the openai client and gRPC answer alike."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.bench.family_check import MAX_TOKENS, check_family
from jaxserve.models.hf_config import read_hf_config
from jaxserve.models.hf_layout import hf_shapes
from jaxserve.models.random_weights import family_tensor

FIXTURES = Path(__file__).parents[1] / "models" / "families"
FEW_PROGRAMS = ["--max_rows=2", "--max_prefill_tokens=32", "--num_pages=64"]


def write_model(directory: Path, family: str) -> None:
    config = json.loads((FIXTURES / family / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(read_hf_config(directory))
    tensors = {name: family_tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: id for id, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.filterwarnings("default")  # openai's and its libraries' are theirs
def test_a_served_family_answers_alike_everywhere(tmp_path: Path) -> None:
    directory = tmp_path / "qwen3-tiny"
    directory.mkdir()
    write_model(directory, "qwen3")
    answer = check_family(f"hf:{directory}", FEW_PROGRAMS)
    assert answer.model == "qwen3-tiny"
    assert answer.chat and len(answer.completion) <= MAX_TOKENS
