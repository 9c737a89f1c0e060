"""What a model directory says about text: which file counts, and what is wrong with a bad one."""

import json
from pathlib import Path

import pytest

from jaxserve import launch
from jaxserve.errors import ConfigError
from jaxserve.models.sources import DEMO_DIRECTORY
from jaxserve.models.text_files import TextFiles, check_vocabulary, read_text_files


@pytest.fixture
def write(tmp_path: Path):
    """Writes files of a model directory, JSON unless they are text; returns its `--model`."""

    def write(files: dict[str, object], kind: str = "hf") -> str:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text, "utf-8")
        return f"{kind}:{tmp_path}"

    return write


# Each says what it is; later ones win over earlier ones.
TEMPLATES = {
    "tokenizer_config.json": {"chat_template": "of the tokenizer"},
    "chat_template.json": {"chat_template": "of JSON"},
    "chat_template.jinja": "of Jinja: é",
}


def test_models_without_files_say_nothing(write):
    nothing = TextFiles(tokenizer=None, chat_template=None, special_tokens={}, sampling_defaults={})
    assert read_text_files("random:tiny") == nothing
    assert read_text_files(write({})) == nothing


def test_the_demo_model_has_tokenizer_and_template():
    text = read_text_files("demo")
    assert text.tokenizer == DEMO_DIRECTORY / "tokenizer.json"
    assert text.chat_template and "GLOUCESTER" in text.chat_template
    check_vocabulary(text.tokenizer, 2048)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_newer_files_of_a_template_win(write, kind):
    written = {}
    for name, content in TEMPLATES.items():
        written[name] = content
        said = content if isinstance(content, str) else content["chat_template"]
        assert read_text_files(write(written, kind)).chat_template == said


def test_the_users_template_wins_and_the_models_is_not_read(write, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("own")
    model = write({"tokenizer_config.json": {"chat_template": [{"name": "x", "template": "y"}]}})
    assert read_text_files(model, chat_template=str(own)).chat_template == "own"
    assert read_text_files("random:tiny", chat_template=str(own)).chat_template == "own"


def test_the_default_of_several_templates_is_taken(write):
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    model = write({"tokenizer_config.json": {"chat_template": several}})
    assert read_text_files(model).chat_template == "d"


def test_special_tokens_are_strings_or_objects(write):
    files = {
        "tokenizer_config.json": {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
            "eos_token": "</s>",
            "pad_token": None,
            "add_bos_token": True,
            "image_token": "<image>",
        },
        "special_tokens_map.json": {"eos_token": {"content": "<end>"}, "unk_token": "<unk>"},
    }
    expected = {"bos_token": "<s>", "eos_token": "<end>", "unk_token": "<unk>"}
    assert read_text_files(write(files)).special_tokens == expected
    files["tokenizer_config.json"]["added_tokens_decoder"] = {}
    expected = {"bos_token": "<s>", "eos_token": "</s>"}
    assert read_text_files(write(files)).special_tokens == expected


def test_sampling_defaults_have_our_names(write):
    fields = {
        "do_sample": True,
        "temperature": 1,
        "top_k": 0,
        "top_p": 0.8,
        "min_p": None,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "eos_token_id": [1, 2],
        "length_penalty": "none of ours",
    }
    defaults = read_text_files(write({"generation_config.json": fields})).sampling_defaults
    assert defaults == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }
    assert isinstance(defaults["temperature"], float)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", {"temperature": "warm"}, "temperature: got 'warm'; wanted a nu"),
        ("generation_config.json", {"temperature": True}, "temperature: got True; wanted a number"),
        ("generation_config.json", {"temperature": -1}, r"temperature: got -1.0; allowed: a numb"),
        ("generation_config.json", '{"temperature": NaN}', "temperature: got nan; allowed: a numb"),
        ("generation_config.json", '{"top_p": 1' + "0" * 400 + "}", "top_p: got 10*; wanted a num"),
        ("generation_config.json", {"top_p": 0}, r"top_p: got 0.0; allowed: a number in \(0, 1\]"),
        ("generation_config.json", {"top_k": 1.5}, "top_k: got 1.5; wanted a whole number"),
        ("generation_config.json", {"top_k": -1}, r"top_k: got -1; allowed: 0 \(off\)"),
        ("generation_config.json", {"min_p": 2}, "min_p: got 2.0; allowed"),
        ("generation_config.json", {"repetition_penalty": 0}, "repetition_penalty: got 0.0; allo"),
        ("generation_config.json", {"max_new_tokens": 0}, "max_new_tokens: got 0; wanted 1 or mo"),
        ("generation_config.json", "{", "damaged"),
        ("tokenizer_config.json", "[]", "got list; wanted an object"),
        ("tokenizer_config.json", '{"a": "\ud800"}', "damaged"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template: got int; wanted a string"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "chat_template: got .* in a list; wan"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "x"}]},
            "chat_template: got templates 'rag'; wanted one named 'default'; try --chat_template",
        ),
        ("tokenizer_config.json", {"bos_token": 1}, "bos_token: got 1; wanted a string"),
        ("special_tokens_map.json", {"bos_token": {}}, "bos_token: got {}; wanted a string"),
        ("chat_template.json", "nothing", "damaged"),
    ],
)
def test_a_damaged_file_is_named_with_its_field(write, tmp_path, name, content, message):
    if isinstance(content, str):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
        content = {}
        model = write({})
    else:
        model = write({name: content})
    with pytest.raises(ConfigError, match=message) as caught:
        read_text_files(model)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_a_template_that_cannot_be_read_is_named(write, tmp_path):
    with pytest.raises(ConfigError, match=r"^chat_template: .*no\.jinja: No such file"):
        read_text_files("demo", chat_template=str(tmp_path / "no.jinja"))
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="got no UTF-8 at byte 2; wanted a Jinja template"):
        read_text_files(write({}))


# ---------------------------------------------------------------- tokenizer and vocabulary

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}
UNIGRAM = {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0], ["c", -2.0]]}


@pytest.mark.parametrize("model", [BPE, UNIGRAM], ids=["bpe", "unigram"])
def test_ids_beyond_the_models_vocabulary_are_refused(write, tmp_path, model):
    added = [{"id": 4, "content": "<e>"}, {"id": 3, "content": "<d>"}, {"id": 0, "content": "a"}]
    write({"tokenizer.json": {"model": model, "added_tokens": added}})
    path = tmp_path / "tokenizer.json"
    check_vocabulary(path, 5)
    check_vocabulary(path, 64)
    message = r"json: got token '{}' with id {}; wanted ids below {}, the model's vocabulary"
    for size, token in ((4, "<e>"), (3, "<d>"), (2, "c"), (1, "b")):
        with pytest.raises(ConfigError, match=message.format(token, size, size)):
            check_vocabulary(path, size)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", {}, {"model": {}}, {"model": {"vocab": {"a": "0"}}}, {"model": {"vocab": ["a"]}}],
)
def test_a_damaged_tokenizer_is_refused(write, tmp_path, content):
    write({"tokenizer.json": content})
    with pytest.raises(ConfigError, match=r"tokenizer\.json: (damaged|got list; wanted an obj)"):
        check_vocabulary(tmp_path / "tokenizer.json", 8)


@pytest.mark.parametrize("executor", ["jax", "mock"])
def test_an_engine_refuses_a_tokenizer_of_another_model(write, tmp_path, capfd, executor):
    fields = json.loads((DEMO_DIRECTORY / "tokenizer.json").read_text())
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 2048, "content": "<mask>"})
    config = (DEMO_DIRECTORY / "config.json").read_text()
    model = write({"tokenizer.json": fields, "config.json": config}, "orbax")
    arguments = ["generate", f"--model={model}", "--prompt=x", f"--executor={executor}"]
    assert launch.main(arguments) == 2
    _, err = capfd.readouterr()
    assert err == (
        f"jaxserve: {tmp_path}/tokenizer.json: got token '<mask>' with id 2048; wanted ids below"
        " 2048, the model's vocabulary; try the tokenizer that came with the model\n"
    )
