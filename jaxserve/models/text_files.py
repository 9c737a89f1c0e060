"""What a model directory says about text: tokenizer, chat template, special tokens, sampling.

The same file names are read in directories of Hugging Face and in ours. Knows neither Jinja nor
tokenizers: templates come back as source, tokenizer.json as a path. Loads no JAX.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxserve.errors import BadRequest, ConfigError
from jaxserve.models.hf_config import GENERATION_FILE, Fields, read_generation_fields, read_json
from jaxserve.models.sources import ModelSource, parse_source
from jaxserve.request import SamplingParams, check_sampling

TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
SPECIAL_TOKENS_FILE: Final = "special_tokens_map.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
TEMPLATE_JSON_FILE: Final = "chat_template.json"
DEFAULT_TEMPLATE: Final = "default"
"""The one that is taken of several templates with names."""

SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_NUMBERS: Final = ("temperature", "top_p", "min_p", "repetition_penalty")
_WHOLE_NUMBERS: Final = {"top_k": "top_k", "max_new_tokens": "max_tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """What a model says about text; a model that serves token ids only says nothing.

    `tokenizer` is its tokenizer.json and `chat_template` Jinja source. `special_tokens` are those
    that templates see, by name (`bos_token`, ...). `sampling_defaults` are fields of
    `jaxserve.request.SamplingParams` by name; `max_tokens` among them may be more than a prompt
    leaves room for.
    """

    tokenizer: Path | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
    sampling_defaults: Mapping[str, float | int]


def read_text_files(model: str, *, chat_template: str = "") -> TextFiles:
    """What the directory of `--model` says about text; `random:` models say nothing.

    `chat_template` is the path of a template that is taken in place of the model's own. Raises
    ConfigError naming file, field, got and wanted.
    """
    source = parse_source(model)
    own_template = _read_template(Path(chat_template)) if chat_template else None
    if source.kind == "random":
        return TextFiles(
            tokenizer=None, chat_template=own_template, special_tokens={}, sampling_defaults={}
        )
    directory = source.directory
    fields = _read_json_if_there(directory / TOKENIZER_CONFIG_FILE)
    return TextFiles(
        tokenizer=tokenizer_file(source),
        chat_template=own_template if chat_template else _model_template(directory, fields),
        special_tokens=_special_tokens(directory, fields),
        sampling_defaults=_sampling_defaults(directory),
    )


def tokenizer_file(source: ModelSource) -> Path | None:
    """The tokenizer.json of a source; None when it serves token ids only."""
    if source.kind == "random":
        return None
    path = source.directory / TOKENIZER_FILE
    return path if path.exists() else None


def check_vocabulary(tokenizer: Path, vocab_size: int) -> None:
    """Raise ConfigError if a tokenizer.json has ids that a model of `vocab_size` has not.

    A tokenizer with fewer is fine: models pad their vocabularies.
    """
    fields = read_json(tokenizer)
    try:
        beyond = min((entry for entry in _entries(fields) if entry[0] >= vocab_size), default=None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{tokenizer}: damaged: {error!r}; try a fresh copy of the model"
        ) from error
    if beyond is not None:
        raise ConfigError(
            f"{tokenizer}: got token {beyond[1]!r} with id {beyond[0]}; wanted ids below"
            f" {vocab_size}, the model's vocabulary; try the tokenizer that came with the model"
        )


def _entries(fields: Fields) -> Iterator[tuple[int, str]]:
    """Id and text of every token; Unigram models list theirs, the others map text to id."""
    vocab = fields["model"]["vocab"]
    if isinstance(vocab, list):
        yield from ((id, text) for id, (text, _) in enumerate(vocab))
    else:
        yield from ((id, text) for text, id in vocab.items())
    yield from ((token["id"], token["content"]) for token in fields.get("added_tokens") or ())


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"chat_template: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"chat_template: {path}: got no UTF-8 at byte {error.start}; wanted a Jinja template"
        ) from error


def _read_json_if_there(path: Path) -> Fields:
    return read_json(path) if path.exists() else {}


def _model_template(directory: Path, tokenizer_config: Fields) -> str | None:
    """Newer files win: a file of Jinja, then one of JSON, then a field of the tokenizer's."""
    if (directory / TEMPLATE_FILE).exists():
        return _read_template(directory / TEMPLATE_FILE)
    path = directory / TEMPLATE_JSON_FILE
    if path.exists():
        return _template_field(path, read_json(path))
    return _template_field(directory / TOKENIZER_CONFIG_FILE, tokenizer_config)


def _template_field(path: Path, fields: Fields) -> str | None:
    value = fields.get("chat_template")
    if isinstance(value, list):
        value = _default_template(path, value)
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"{path}: chat_template: got {type(value).__name__}; wanted a string, or a list of"
            " objects with name and template"
        )
    return value


def _default_template(path: Path, templates: list[Any]) -> object:
    try:
        by_name = {entry["name"]: entry["template"] for entry in templates}
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: chat_template: got {error!r} in a list; wanted objects with name and template"
        ) from error
    if DEFAULT_TEMPLATE not in by_name:
        raise ConfigError(
            f"{path}: chat_template: got templates {', '.join(map(repr, by_name))}; wanted one"
            f" named {DEFAULT_TEMPLATE!r}; try --chat_template=<file>"
        )
    return by_name[DEFAULT_TEMPLATE]


def _special_tokens(directory: Path, tokenizer_config: Fields) -> dict[str, str]:
    """As transformers: special_tokens_map.json counts, and wins, beside older tokenizer files.

    Newer ones list their added tokens; what else they leave out is not there.
    """
    tokens = _tokens_in(directory / TOKENIZER_CONFIG_FILE, tokenizer_config)
    if "added_tokens_decoder" in tokenizer_config:
        return tokens
    path = directory / SPECIAL_TOKENS_FILE
    return tokens | _tokens_in(path, _read_json_if_there(path))


def _tokens_in(path: Path, fields: Fields) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = fields.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
        elif value is not None:
            raise ConfigError(
                f"{path}: {name}: got {value!r}; wanted a string, or an object with content"
            )
    return tokens


def _sampling_defaults(directory: Path) -> dict[str, float | int]:
    path = directory / GENERATION_FILE
    fields = {k: v for k, v in read_generation_fields(directory).items() if v is not None}
    numbers = {name: _number(path, name, fields[name]) for name in _NUMBERS if name in fields}
    whole = {
        ours: _whole_number(path, name, fields[name])
        for name, ours in _WHOLE_NUMBERS.items()
        if name in fields
    }
    if whole.get("max_tokens", 1) < 1:
        raise ConfigError(f"{path}: max_new_tokens: got {whole['max_tokens']}; wanted 1 or more")
    defaults = {**numbers, **whole}
    try:
        check_sampling(SamplingParams(**defaults))
    except BadRequest as error:
        raise ConfigError(f"{path}: {error}") from error
    return defaults


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass  # a whole number beyond all floats
    raise ConfigError(f"{path}: {name}: got {value!r}; wanted a number")


def _whole_number(path: Path, name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ConfigError(f"{path}: {name}: got {value!r}; wanted a whole number")
