"""Bodies of the OpenAI endpoints as `Ask`s. Knows JSON and OpenAI's names, no socket and no engine.

Every parameter is honoured or refused by name. Those that this server has no use for pass with the
values that ask for nothing (`_NEUTRAL`), because clients send them unasked. Beside OpenAI's there
are parameters under the names that vLLM gave them, such as `top_k`.
Source: the API reference of OpenAI, platform.openai.com/docs/api-reference, 2026.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec
import numpy as np

from jaxserve.errors import BadRequest

MAX_PROMPTS: Final = 128
"""Prompts in one body of /v1/completions."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a stream is written. Obfuscation, padding against eavesdroppers, is not there."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take; null is the same as absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # How tokens are drawn and where a sample ends.
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Not OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    group: str | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    # Both ask for what one replica does anyway: go where the conversation's pages are.
    session_id: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(Body):
    """/v1/completions. `prompt` is a text, token ids, or several of either."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn. What only other servers' answers hold may be there as null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: None = None
    function_call: None = None
    tool_calls: None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates see it; `developer` is what OpenAI calls `system` nowadays."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return turn if self.name is None else turn | {"name": self.name}


class ChatBody(Body):
    """/v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Not OpenAI's.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_ANYWHERE: Final[dict[str, tuple[Any, ...]]] = {
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": (),
}
_NEUTRAL: Final[dict[type[Body], dict[str, tuple[Any, ...]]]] = {
    CompletionBody: _ANYWHERE | {"suffix": ("",)},
    ChatBody: _ANYWHERE
    | {
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "prompt_cache_options": (),
        "moderation": (),
    },
}
"""OpenAI's parameters without use here, and the values, beside null, that ask for nothing."""

_SAMPLING: Final = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "n": "n",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "include_stop_str_in_output": "include_stop",
    "prompt_logprobs": "prompt_logprobs",
}
"""Field of a body -> field of `SamplingParams`."""


Kind = TypeVar("Kind", CompletionBody, ChatBody)


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Kind]):
    """A body that was read. `names` maps fields of a request to those of the body, for errors."""

    body: Kind
    sampling: Mapping[str, Any]
    names: Mapping[str, str]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)


def parse_body(kind: type[Kind], data: bytes) -> Parsed[Kind]:
    """The body in `data`. Raises BadRequest naming the parameter, its value and what is allowed."""
    fields = _read_object(data)
    for name, allowed in _NEUTRAL[kind].items():
        value = fields.pop(name, None)
        if value is not None and value not in allowed:
            shown = " or ".join(repr(choice) for choice in (*allowed, None))
            raise BadRequest(name, value, f"{shown}: this server does not have it")
    try:
        body = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _as_bad_request(str(error), fields) from None
    _check_together(body)
    names = {
        "include_stop": "include_stop_str_in_output",
        "text": "prompt",
        "prompt token_ids": "prompt",
        "client": "user",
    }
    if isinstance(body, ChatBody):
        names |= {"logprobs": "top_logprobs", "prompt": "messages", "text": "messages"}
        if body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
    return Parsed(body, _sampling(body), names)


def read_prompts(body: CompletionBody) -> list[str | np.ndarray]:
    """The prompts of a body: texts, or token ids as int64 [T]."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("prompt", prompt, "a text, token ids, or a list of either")
    if all(type(item) is int for item in prompt):
        return [_token_ids("prompt", prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise BadRequest("prompt", f"{len(prompt)} prompts", f"at most {MAX_PROMPTS}")
    prompts: list[str | np.ndarray] = []
    for place, item in enumerate(prompt):
        if isinstance(item, str):
            prompts.append(item)
        else:
            prompts.append(_token_ids(f"prompt[{place}]", item))
    return prompts


def _read_object(data: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("body", f"{len(data)} bytes", f"a JSON object ({error})") from None
    if not isinstance(fields, dict):
        raise BadRequest("body", type(fields).__name__, "a JSON object")
    return fields


def _sampling(body: CompletionBody | ChatBody) -> dict[str, Any]:
    """Fields of `SamplingParams` that the body sets."""
    given = {
        field: value
        for name, field in _SAMPLING.items()
        if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") == -1:  # vLLM's word for off
        given["top_k"] = 0
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        given["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    if isinstance(body, CompletionBody):
        if body.logprobs is not None:
            given["logprobs"] = body.logprobs
    else:
        if body.max_completion_tokens is not None:
            given["max_tokens"] = body.max_completion_tokens
        if body.logprobs:
            given["logprobs"] = body.top_logprobs or 0
    return given


def _check_together(body: CompletionBody | ChatBody) -> None:
    """Parameters that mean something only beside others."""
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options", "a value", "null unless stream is true")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise BadRequest("stream_options.include_obfuscation", True, "false or null")
    if body.request_id is not None and not _is_header_text(body.request_id):
        raise BadRequest("request_id", body.request_id, "printable ASCII")
    if isinstance(body, CompletionBody):
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise BadRequest("best_of", body.best_of, f"n ({body.n or 1}): all samples are given")
        if body.echo and body.logprobs is not None:
            raise BadRequest("echo", True, "false with logprobs: a prompt's are not computed")
        return
    if not body.messages:
        raise BadRequest("messages", [], "at least one message")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs", body.top_logprobs, "null unless logprobs is true")
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    if both and body.max_tokens != body.max_completion_tokens:
        allowed = f"max_completion_tokens ({body.max_completion_tokens}), whose old name it is"
        raise BadRequest("max_tokens", body.max_tokens, allowed)


def _is_header_text(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise BadRequest("logit_bias", key, "token ids as keys")
    return int(key)


def _token_ids(name: str, items: object) -> np.ndarray:
    if not isinstance(items, list) or not all(type(item) is int for item in items):
        raise BadRequest(name, items, "a text or token ids")
    try:
        return np.asarray(items, np.int64)
    except OverflowError:
        raise BadRequest(name, max(items, key=abs), "token ids") from None


# ------------------------------------------------------------------------------ msgspec's words

_PLACE: Final = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")


def _as_bad_request(text: str, fields: Mapping[str, Any]) -> BadRequest:
    """A ValidationError, such as "Expected `int`, got `str` - at `$.n`", in our words."""
    what, _, path = text.partition(" - at `")
    path = path.removesuffix("`").removeprefix("$")
    steps = [name or int(number) for name, number in _PLACE.findall(path)]
    named = re.search(r"`([^`]*)`$", what)
    if named is not None and "unknown field" in what:
        name = _joined([*steps, named[1]])
        return BadRequest(name, _value_at(fields, [*steps, named[1]]), "nothing: it is not known")
    if named is not None and "missing required field" in what:
        return BadRequest(_joined([*steps, named[1]]), "nothing", "a value")
    allowed = what.partition(", got ")[0].replace("`", "").removeprefix("Expected ")
    allowed = allowed.replace(" | ", " or ")
    if allowed.startswith("Invalid enum value"):
        allowed = _choices(steps)
    return BadRequest(_joined(steps), _value_at(fields, steps), allowed)


def _choices(steps: Sequence[str | int]) -> str:
    if steps[-1] == "role":
        return "system, developer, user or assistant"
    return "'text': this server reads text only"


def _joined(steps: Sequence[str | int]) -> str:
    """`messages[0].role` of its steps."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".") or "body"


def _value_at(value: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return "a wrong value"
    return value
