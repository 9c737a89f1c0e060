"""A model's chat template: messages become the text of a prompt. Knows no tokenizer and no HTTP.

The meaning is that of transformers' `apply_chat_template`. Templates run in Jinja's sandbox, but
they come with a model and are not held to a time limit: serve models that you trust.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxserve.errors import BadRequest, ConfigError

MAX_PROMPT_CHARS: Final = 2**24
"""More than any context holds, little enough for memory."""

MAX_SAID_CHARS: Final = 300
"""Of a template's own words in an error."""

_RESERVED: Final = ("messages", "tools", "documents", "add_generation_prompt")

# Names that clients give the text before an answer; templates read the first, some the second.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One template, compiled. `special_tokens` are variables of it, by name (`bos_token`, ...).

    Raises ConfigError with the line of a syntax error. Methods may be called from any thread.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template: line {error.lineno}: {error.message}") from error
        except (SyntaxError, RecursionError) as error:  # of the Python that Jinja makes of it
            said = getattr(error, "msg", error)
            raise ConfigError(f"chat template: cannot be compiled: {said}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = {},  # noqa: B006 - a mapping is read only
    ) -> str:
        """The prompt. Messages and `variables` hold JSON values; fields that are None are left out.

        `add_generation_prompt` opens the answer's turn, `continue_final_message` leaves the last
        message's open. Raises BadRequest, with what the template says of messages it refuses.
        """
        self._check(messages, add_generation_prompt, continue_final_message, variables)
        try:
            chat = [_fields(message) for message in messages]
            # Nobody can write the mark into a message beforehand.
            mark = secrets.token_hex(16) + " " if continue_final_message else ""
            last_text = _append_to_last(chat, mark) if mark else ""
            text = self._render(chat, variables, add_generation_prompt=add_generation_prompt)
        except BadRequest:
            raise
        except Exception as error:  # whatever a template does wrong, these messages made it
            raise _refused(messages, _said(error)) from error
        if not mark:
            return text
        place = text.rfind(mark.strip())
        if place < 0 or last_text.strip() not in text:
            raise _refused(messages, "the final message's text is not in the prompt")
        kept = text[:place]
        # A template that strips messages has stripped the mark's blank, and strips this end too.
        return kept if text.startswith(mark, place) else kept.rstrip()

    def _check(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> None:
        if not messages:
            raise BadRequest("messages", messages, "at least one message")
        if add_generation_prompt and continue_final_message:
            raise BadRequest("continue_final_message", True, "with add_generation_prompt false")
        for name in (*_RESERVED, *self._special_tokens):
            if name in variables:
                raise BadRequest(
                    f"chat_template_kwargs.{name}",
                    variables[name],
                    "names that the server does not set itself",
                )

    def _render(
        self,
        chat: list[dict[str, Any]],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
    ) -> str:
        pieces, num_chars = [], 0
        context = {
            **self._special_tokens,
            **variables,
            "messages": chat,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        for piece in self._template.generate(context):
            num_chars += len(piece)
            if num_chars > MAX_PROMPT_CHARS:
                raise _refused(chat, f"the prompt has more than {MAX_PROMPT_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)


def _fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without fields that are None, which templates would print; reasoning has all names."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _append_to_last(chat: list[dict[str, Any]], mark: str) -> str:
    """Append `mark` to the last message's text; returns the text before. The message is ours."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + mark
        return content
    if isinstance(content, list):
        for place, part in reversed(list(enumerate(content))):
            if isinstance(part.get("text"), str):
                marked = {**part, "text": part["text"] + mark}
                chat[-1]["content"] = [*content[:place], marked, *content[place + 1 :]]
                return part["text"]
    raise _refused(chat, "the final message has no text to continue")


def _said(error: Exception) -> str:
    """A template's own words as they are; errors of what it ran with their type."""
    said = str(error)
    if type(error) is not jinja2.TemplateError:
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= MAX_SAID_CHARS else said[: MAX_SAID_CHARS - 3] + "..."


def _refused(messages: Sequence[Mapping[str, Any]], said: str) -> BadRequest:
    roles = ", ".join(
        str(message.get("role")) if isinstance(message, Mapping) else type(message).__name__
        for message in messages
    )
    return BadRequest("messages", roles, f"what the chat template takes; it says: {said}")


class _Generation(Extension):
    """`{% generation %}` marks answers for training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
