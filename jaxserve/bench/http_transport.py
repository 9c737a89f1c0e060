"""The load client's OpenAI HTTP: streamed completions of ours or of any other server.

Connections are kept and used again, as many as there are streams. Knows what requests and events
mean, no workload beyond one request, and keeps no time.

An event brings as many tokens as its `token_ids` (ours and vLLM's send them when asked). Where
there are none, the tokens that `usage` counts are spread evenly over the answer's events, and where
there is no usage either, an event counts as one token; `counted` says which it was.
"""

import asyncio
import ssl
from collections import Counter
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import numpy as np

from jaxserve.bench.http_connection import Answer, Connection
from jaxserve.bench.transport import (
    REFUSED,
    Asking,
    Ending,
    OnTokens,
    ServerFacts,
    can_connect,
)
from jaxserve.errors import ConfigError
from jaxserve.workload.work import Work

ASK_S: Final = 10.0
"""Longest wait for what the server says of itself."""

CHAT: Final = "chat/completions"
TEXT: Final = "completions"
_GIVE_IDS: Final = ("jaxserve", "vllm")
"""Servers, by `owned_by` of their models, that know `return_token_ids`."""
_WORDS: Final = (
    "time year people way day man thing woman life child world school state family student group"
    " country problem hand part place case week company system program question work night point"
).split()


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event: Final = msgspec.json.Decoder(_Event).decode


class HttpTransport:
    """An OpenAI server at `url`, such as "http://127.0.0.1:8471/v1"; host:port is its short form.

    `chat` sends the prompt as one user message of words, one per token id: how many tokens they
    are is the server's to say.
    """

    def __init__(self, url: str, asking: Asking, *, chat: bool = False):
        """Raises ConfigError for an address that is none."""
        place = urlsplit(url if "://" in url else f"http://{url}/v1")
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ConfigError(f"server: got {url!r}; allowed: host:port or http(s)://host:port/v1")
        self._secure = ssl.create_default_context() if place.scheme == "https" else None
        self._address = place.hostname, place.port or (443 if self._secure else 80)
        self._host, self._base = place.netloc, place.path.rstrip("/")
        self._url, self._asking, self._chat = url, asking, chat
        self._path = f"{self._base}/{CHAT if chat else TEXT}"
        self._model, self._owner = asking.model, ""
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._sources: Counter[str] = Counter()

    @property
    def counted(self) -> str:
        said = [f"{source} ({count} answers)" for source, count in self._sources.most_common()]
        return ", ".join(said) or "nothing"

    async def facts(self) -> ServerFacts:
        answer = Answer()
        head = self._head("GET", f"{self._base}/models", self._asking.api_key, 0)
        try:
            async with asyncio.timeout(ASK_S):
                await self._exchange(head, answer)
        except (OSError, TimeoutError) as error:
            raise self._silent(repr(error)) from None
        try:
            models = {model["id"]: model for model in msgspec.json.decode(answer.body)["data"]}
            name = self._model or next(iter(models))
        except (msgspec.DecodeError, LookupError, StopIteration, TypeError):
            raise self._silent(f"HTTP {answer.status} to GET {self._base}/models") from None
        if name not in models:
            known = ", ".join(models)
            raise ConfigError(f"served_model: got {name!r}; allowed, says the server: {known}")
        fields = models[name]
        self._model, self._owner = name, str(fields.get("owned_by", ""))
        return ServerFacts(
            model=name,
            vocab_size=_count(fields.get("vocab_size")),
            max_context=_count(fields.get("max_model_len")),
            described={"server": f"OpenAI's HTTP at {self._url}, owned by {self._owner or '-'}"},
        )

    def _silent(self, said: str) -> ConfigError:
        return ConfigError(
            f"server: {self._url} does not answer as OpenAI's API ({said}); start one with"
            " `jaxserve serve` (its HTTP port is gRPC's + 1), or name another with --server"
        )

    def prepare(self, work: Work, token_ids: np.ndarray) -> bytes:
        """The whole request, as bytes."""
        asking = self._asking
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": work.max_tokens,
            "temperature": asking.temperature,
            "seed": work.number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ids = token_ids.tolist()
        if self._chat:
            words = " ".join(_WORDS[token % len(_WORDS)] for token in ids)
            body["messages"] = [{"role": "user", "content": words}]
        else:
            body["prompt"] = ids
        if asking.ignore_eos:
            body["ignore_eos"] = True
        if asking.name_clients:
            body["user"] = work.client
        if work.priority:
            body["priority"] = work.priority
        if self._owner in _GIVE_IDS:
            body["return_token_ids"] = True
        if self._owner == "jaxserve" and work.session is not None:
            body["session_id"] = work.session
        data = msgspec.json.encode(body)
        return self._head("POST", self._path, asking.key(work.client), len(data)) + data

    def _head(self, method: str, path: str, api_key: str, size: int) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}", "Accept: */*"]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        if size:
            lines += ["Content-Type: application/json", f"Content-Length: {size}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    async def send(self, prepared: bytes, timeout_s: float | None, on_tokens: OnTokens) -> Ending:
        answer = _Completion(on_tokens)
        try:
            async with asyncio.timeout(timeout_s):
                await self._exchange(prepared, answer)
        except TimeoutError:
            return Ending(reason="deadline", fault="deadline", message="the client hung up")
        except OSError as error:
            kind = type(error).__name__
            return Ending(reason="error", fault=kind, message=str(error), lost=True)
        finally:
            answer.give_out()
        if answer.source:
            self._sources[answer.source] += 1
        return answer.ending()

    async def _exchange(self, data: bytes, answer: Answer) -> None:
        """Raises OSError; a connection that was not read to the end is closed."""
        connection = None
        while self._idle and connection is None:
            connection = self._idle.pop()
            connection = connection if connection.usable else None
        if connection is None:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._open), *self._address, ssl=self._secure
            )
        try:
            await connection.ask(data, answer)
        finally:
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.close()

    async def alive(self) -> bool:
        return await can_connect(*self._address)

    async def close(self) -> None:
        self._idle.clear()
        for connection in self._open:
            connection.close()
        while self._open:
            await asyncio.sleep(0)  # until the loop has closed their sockets


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


class _Completion(Answer):
    """A streamed completion: counts tokens, and knows how it ended."""

    def __init__(self, on_tokens: OnTokens):
        super().__init__(streams=True)
        self.source = ""
        self._on_tokens = on_tokens
        self._held: list[float] = []
        self._given = 0
        self._usage: _Usage | None = None
        self._finish: str | None = None
        self._done = False
        self._error: Any = None

    def take_event(self, at_s: float, data: bytes) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = _decode_event(data)
        except msgspec.DecodeError as error:
            self._error = f"an event that is none: {error}"
            return
        if event.error is not None:
            self._error = event.error
        if event.usage is not None:
            self._usage = event.usage
        for choice in event.choices:
            self._finish = choice.finish_reason or self._finish
            if choice.token_ids:
                self._give(at_s, len(choice.token_ids))
                self.source = "token ids of each event"
            elif choice.token_ids is None and (
                choice.text or (choice.delta is not None and choice.delta.content)
            ):
                self._held.append(at_s)

    def _give(self, at_s: float, num_tokens: int) -> None:
        self._given += num_tokens
        self._on_tokens(at_s, num_tokens)

    def give_out(self) -> None:
        """Tell of the events whose tokens are not known one by one; idempotent."""
        held, self._held = self._held, []
        if not held:
            return
        total = len(held)
        self.source = "events, one token each"
        if self._usage is not None:
            total = max(0, self._usage.completion_tokens - self._given)
            self.source = "usage, spread evenly over the answer's events"
        for place, at_s in enumerate(held):
            # Rounded up: what the first event brought was a token at least.
            share = -(-total * (place + 1) // len(held)) - -(-total * place // len(held))
            if share:
                self._give(at_s, share)

    def ending(self) -> Ending:
        """How it ended; the body has been read whole."""
        if self.status != 200:
            return _refused(self.status, self.body)
        if self._error is not None:
            return _event_error(self._error)
        if not self._done or self._finish is None:
            return Ending(reason="error", fault="cut short", message="no finish before the end")
        usage = self._usage or _Usage()
        details = usage.prompt_tokens_details
        return Ending(
            reason=self._finish if self._finish in ("length", "abort") else "stop",
            cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
            prompt_tokens=usage.prompt_tokens,
        )


def _refused(status: int, body: bytes) -> Ending:
    try:
        message = str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    reason = "deadline" if status == 504 else REFUSED if status < 500 or status == 503 else "error"
    return Ending(reason=reason, fault=f"HTTP {status}", message=message)


def _event_error(error: Any) -> Ending:
    fields = error if isinstance(error, dict) else {"message": error}
    kind, message = str(fields.get("type", "error")), str(fields.get("message", ""))
    reason = "deadline" if kind == "timeout_error" else "error"
    return Ending(reason=reason, fault=kind, message=message)
