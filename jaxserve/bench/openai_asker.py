"""The official OpenAI client's requests, and its answers in one shape, whole or streamed.

Knows the client's methods and both endpoints' shapes. Judges no answer, but for what cannot be read
or put together: that raises CheckFailed.
"""

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

COMPLETIONS: Final = "completions"
CHAT: Final = "chat.completions"
ABSENT: Final = object()
"""Takes a parameter out of a request that would have it by default."""


class CheckFailed(Exception):
    """An answer is not what the parameter asks for."""


@dataclass(frozen=True, slots=True)
class Clients:
    """The official client: an `openai.OpenAI` and an `openai.AsyncOpenAI`."""

    blocking: Any
    asyncio: Any

    def method(self, endpoint: str, *, blocking: bool) -> Callable[..., Any]:
        """The client's `create` of an endpoint."""
        client = self.blocking if blocking else self.asyncio
        resource = client.completions if endpoint == COMPLETIONS else client.chat.completions
        return resource.create

    async def close(self) -> None:
        self.blocking.close()
        await self.asyncio.close()


@dataclass(slots=True)
class Token:
    """A token's text, its log-probability, and those of the likeliest at its place."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(slots=True)
class Choice:
    """One choice, whole or put together of its chunks. `token_ids` is None where none came."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    tokens: list[Token] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Reply:
    """An answer of either endpoint, whole or streamed. `header_id` is its X-Request-Id.

    `ends_with_usage` says that usage came in a last body without choices, and in no other.
    """

    id: str
    model: str
    header_id: str | None
    choices: dict[int, Choice]
    usage: dict[str, Any] | None
    ends_with_usage: bool

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def token_ids(self) -> list[int]:
        """Of the first choice. Raises CheckFailed when there are none."""
        ids = self.choices[0].token_ids
        if ids is None:
            raise CheckFailed("no token_ids in the answer")
        return ids

    def count(self, name: str) -> int:
        """A number of the usage."""
        if self.usage is None:
            raise CheckFailed("no usage in the answer")
        if name == "cached_tokens":
            return self.usage["prompt_tokens_details"][name]
        return self.usage[name]


class Asker:
    """Sends requests to one endpoint in one mode; greedy ones of eight tokens unless told.

    `references` holds the answers of `reference`, by request, for all askers of a run.
    """

    def __init__(
        self,
        clients: Clients,
        endpoint: str,
        mode: str,
        model: str,
        references: dict[str, "asyncio.Task[Reply]"],
    ):
        self.endpoint, self.mode, self.model = endpoint, mode, model
        self._clients, self._references = clients, references
        self._blocking = mode == "sync"
        self._known = inspect.signature(clients.method(endpoint, blocking=True)).parameters
        self._defaults: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
        if endpoint == COMPLETIONS:
            self._defaults["prompt"] = "ROMEO:"
        else:
            self._defaults["messages"] = [said_by("user", "Who art thou?")]
        if mode == "stream":
            self._defaults |= {"stream": True, "stream_options": {"include_usage": True}}

    async def __call__(self, **fields: Any) -> Reply:
        """Ask. Parameters that the client's method does not have go into its `extra_body`."""
        fields = {
            name: value for name, value in (self._defaults | fields).items() if value is not ABSENT
        }
        own = {name: fields.pop(name) for name in list(fields) if name not in self._known}
        create = self._clients.method(self.endpoint, blocking=self._blocking)
        arguments = {**fields, "extra_body": own}
        if self._blocking:
            return await asyncio.to_thread(self._ask_blocking, create, arguments)
        got = await create(**arguments)
        if not fields.get("stream"):
            return self._read([got], got._request_id)
        return self._read([chunk async for chunk in got], got.response.headers["x-request-id"])

    def _ask_blocking(self, create: Callable[..., Any], arguments: dict[str, Any]) -> Reply:
        got = create(**arguments)
        if not arguments.get("stream"):
            return self._read([got], got._request_id)
        return self._read(list(got), got.response.headers["x-request-id"])

    async def reference(self, **fields: Any) -> Reply:
        """The answer that a request gets from the blocking client; equal ones are sent once."""
        key = f"{self.endpoint} {sorted(fields.items())}"
        if key not in self._references:
            plain = Asker(self._clients, self.endpoint, "sync", self.model, self._references)
            self._references[key] = asyncio.ensure_future(plain(**fields))
        return await self._references[key]

    def with_clients(self, clients: Clients) -> "Asker":
        """The same with other clients."""
        return Asker(clients, self.endpoint, self.mode, self.model, self._references)

    def prompt(self, text: str) -> dict[str, Any]:
        """The parameter that says `text` at this endpoint."""
        if self.endpoint == COMPLETIONS:
            return {"prompt": text}
        return {"messages": [said_by("user", text)]}

    def _read(self, answers: list[Any], header_id: str | None) -> Reply:
        bodies = [answer.to_dict() for answer in answers]
        counted = [place for place, body in enumerate(bodies) if body.get("usage")]
        last = bodies[-1]
        reply = Reply(
            id=last["id"],
            model=last["model"],
            header_id=header_id,
            choices={},
            usage=last.get("usage"),
            ends_with_usage=counted == [len(bodies) - 1] and not last["choices"],
        )
        for body in bodies:
            if (body["id"], body["model"]) != (reply.id, reply.model):
                raise CheckFailed(f"chunks of one stream differ in id or model: {body}, {last}")
            for part in body["choices"]:
                _add(reply.choices.setdefault(part["index"], Choice()), part)
        return reply


def _add(choice: Choice, part: dict[str, Any]) -> None:
    """Join a choice of a body, which may be a chunk's, to what came before."""
    if choice.finish_reason is not None:
        raise CheckFailed(f"a chunk after the last: {part}")
    said = part.get("message") or part.get("delta")
    choice.text += part["text"] if said is None else said.get("content") or ""
    choice.finish_reason = part["finish_reason"]
    choice.stop_reason = part.get("stop_reason")
    if part.get("token_ids") is not None:
        choice.token_ids = (choice.token_ids or []) + part["token_ids"]
    logprobs = part.get("logprobs")
    if not logprobs:
        return
    if said is None:
        columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
        choice.tokens += [
            Token(text, logprob, list(top.items()))
            for text, logprob, top in zip(*columns, strict=True)
        ]
        choice.text_offsets += logprobs["text_offset"]
    else:
        for token in logprobs["content"]:
            if bytes(token["bytes"]).decode(errors="replace") != token["token"]:
                raise CheckFailed(f"a token whose bytes are another's: {token}")
            top = [(other["token"], other["logprob"]) for other in token["top_logprobs"]]
            choice.tokens.append(Token(token["token"], token["logprob"], top))


def said_by(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
