"""The HTTP dialect: OpenAI's endpoints, health and metrics, as an ASGI application.

Knows HTTP requests and streams of server-sent events. Bodies are `openai_schema.py`'s, answers
`openai_answer.py`'s; what a request becomes is the desk's.

A stream's status line waits for its first tokens, so that a request that is refused late, by a full
queue for instance, still gets its own status. A client that goes away has its request cancelled:
the body has been read by then, so the next thing `receive` says is that it left.
"""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve import __version__
from jaxserve.errors import (
    BadRequest,
    JaxserveError,
    NotReady,
    QueueFull,
    TooLarge,
    Unauthenticated,
)
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.answer import Answer
from jaxserve.server.desk import Desk
from jaxserve.server.intake import Ask
from jaxserve.server.openai_answer import ChatWriter, CompletionWriter, Writer, error_body
from jaxserve.server.openai_schema import (
    ChatBody,
    CompletionBody,
    Parsed,
    parse_body,
    read_prompts,
)
from jaxserve.server.request_log import log_fault

Kind = TypeVar("Kind", CompletionBody, ChatBody)
REQUEST_ID_HEADER: Final = "x-request-id"
RETRY_S: Final = 1
"""What Retry-After says of a server that is loading or draining."""

Messages = list[pb.GenerateResponse]
Exposition = Callable[[], Awaitable[tuple[bytes, str]]]
"""Gives the metrics and their content type."""


def make_app(desk: Desk, *, max_body_bytes: int, exposition: Exposition) -> ASGIApp:
    """The application. Bodies longer than `max_body_bytes` are refused."""
    openai = _OpenAi(desk)

    def posted(
        kind: type[Kind], prepare: Callable[["Call", Parsed[Kind]], Awaitable["_Prepared"]]
    ) -> ASGIApp:
        async def run(call: Call) -> None:
            with desk.reading(method=call.path, peer=call.peer):
                desk.gate.identify(call.headers)  # before anything is read
                parsed = parse_body(kind, await call.body(max_body_bytes))
                with _renamed(parsed.names):
                    prepared = await prepare(call, parsed)
            with _renamed(parsed.names):
                await call.while_connected(openai.answer(call, parsed, prepared))

        return _Endpoint(run)

    async def models(call: Call) -> None:
        desk.gate.identify(call.headers)
        await call.respond({"object": "list", "data": [_model_body(desk)]})

    async def model(call: Call) -> None:
        desk.gate.identify(call.headers)
        desk.intake(call.path_params["model"])
        await call.respond(_model_body(desk))

    async def health(call: Call) -> None:
        if not desk.ready:
            raise NotReady("draining" if desk.draining else "loading")
        await call.respond({"status": "ok"})

    async def version(call: Call) -> None:
        await call.respond({"version": __version__})

    async def metrics(call: Call) -> None:
        content, media_type = await exposition()
        await call.write(content, media_type=media_type)

    return Starlette(
        routes=[
            Route(
                "/v1/completions",
                posted(CompletionBody, openai.prepare_completion),
                methods=["POST"],
            ),
            Route("/v1/chat/completions", posted(ChatBody, openai.prepare_chat), methods=["POST"]),
            Route("/v1/models", _Endpoint(models), methods=["GET"]),
            Route("/v1/models/{model:path}", _Endpoint(model), methods=["GET"]),
            Route("/health", _Endpoint(health), methods=["GET"]),
            Route("/version", _Endpoint(version), methods=["GET"]),
            Route("/metrics", _Endpoint(metrics), methods=["GET"]),
        ],
        exception_handlers={HTTPException: _on_http_exception},
    )


def _model_body(desk: Desk) -> dict[str, Any]:
    model = desk.intake().described.model
    return {
        "id": model.model,
        "object": "model",
        "created": 0,
        "owned_by": "jaxserve",
        "max_model_len": model.max_context,
    }


# -------------------------------------------------------------------------------------- calls


class Call:
    """One HTTP call: what was asked, and the answer's beginning, middle and end."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._request = Request(scope, receive)
        self._receive, self._send = receive, send
        self.started = False
        self.request_id = ""
        self.headers: dict[str, str] = dict(self._request.headers)
        self.path: str = self._request.url.path
        self.path_params: dict[str, str] = self._request.path_params
        client = self._request.client
        self.peer = "http:unknown" if client is None else f"http:{client.host}:{client.port}"

    async def body(self, allowed: int) -> bytes:
        """The body, read no further than it may be long. Raises TooLarge."""
        data = bytearray()
        async for part in self._request.stream():
            data += part
            if len(data) > allowed:
                raise TooLarge("body", f"more than {allowed} bytes", f"at most {allowed} bytes")
        return bytes(data)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, and cancel it when the client goes. The body must have been read."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(self._gone())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        if not task.cancelled():
            task.result()

    async def respond(self, body: dict[str, Any], *, status: int = 200, **headers: str) -> None:
        """Answer with JSON, whole."""
        content = msgspec.json.encode(body)
        await self.write(content, status=status, media_type="application/json", **headers)

    async def write(
        self, content: bytes, *, status: int = 200, media_type: str, **headers: str
    ) -> None:
        """Answer, whole. Keywords are header names with underscores."""
        await self._start(status, media_type, content_length=str(len(content)), **headers)
        await self._send({"type": "http.response.body", "body": content})

    async def begin_stream(self) -> None:
        """Begin to answer with server-sent events."""
        await self._start(200, "text/event-stream", cache_control="no-cache")

    async def write_events(self, *bodies: dict[str, Any]) -> None:
        events = b"".join(map(_event, bodies))
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_stream(self, last: bytes) -> None:
        await self._send({"type": "http.response.body", "body": last})

    async def refuse(self, error: JaxserveError) -> None:
        """Answer with an error: a response of its own, or a stream's last event."""
        if self.started:
            await self.end_stream(_event(error_body(error)))
            return
        headers: dict[str, str] = {}
        match error:
            case QueueFull():
                headers["retry_after"] = str(math.ceil(error.retry_after_s))
            case NotReady():
                headers["retry_after"] = str(RETRY_S)
            case Unauthenticated():
                headers["www_authenticate"] = "Bearer"
            case TooLarge():
                headers["connection"] = "close"  # the rest of the body will not be read
        await self.respond(error_body(error), status=error.http_status, **headers)

    async def _start(self, status: int, media_type: str, **headers: str) -> None:
        self.started = True
        if self.request_id:
            headers[REQUEST_ID_HEADER] = self.request_id
        headers["content_type"] = media_type
        encoded = [
            (name.replace("_", "-").encode(), value.encode("latin-1"))
            for name, value in headers.items()
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Endpoint:
    """An ASGI application of one function, whose errors are answers."""

    def __init__(self, run: Callable[[Call], Awaitable[None]]):
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        try:
            await self._run(call)
        except JaxserveError as error:
            await call.refuse(error)
        except ClientDisconnect:
            pass  # it left while it was still speaking
        except Exception:
            await call.refuse(log_fault(f"serving {call.path}"))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    content = msgspec.json.encode({"error": body})
    headers = {**(error.headers or {}), "content-type": "application/json"}
    return Response(content, status_code=error.status_code, headers=headers)


# ----------------------------------------------------------------------------- OpenAI's calls


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A body's requests, one per prompt, and what writes their answers."""

    asks: list[Ask]
    writer: Writer


class _OpenAi:
    """The two endpoints that generate."""

    def __init__(self, desk: Desk):
        self._desk = desk

    async def prepare_completion(self, call: Call, parsed: Parsed[CompletionBody]) -> _Prepared:
        """/v1/completions"""
        prompts = read_prompts(parsed.body)
        ask = self._ask(call, parsed)
        numbered = len(prompts) > 1
        asks = [
            replace(
                ask,
                prompt=prompt,
                request_id=f"{ask.request_id}-{place}" if numbered else ask.request_id,
            )
            for place, prompt in enumerate(prompts)
        ]
        echoes = [self._echo(prompt) for prompt in prompts] if parsed.body.echo else []
        fields = self._writer_fields(parsed, ask)
        num_samples = parsed.body.n or 1
        return _Prepared(asks, CompletionWriter(**fields, echoes=echoes, num_samples=num_samples))

    async def prepare_chat(self, call: Call, parsed: Parsed[ChatBody]) -> _Prepared:
        """/v1/chat/completions"""
        body, text = parsed.body, self._desk.text
        intake = self._desk.intake(body.model or "")
        template = text.need_template("messages", f"{len(body.messages)} messages")
        text.need_tokenizer("messages", f"{len(body.messages)} messages")
        continued = bool(body.continue_final_message)
        wanted = body.add_generation_prompt
        prompt = template.render(
            [message.for_template() for message in body.messages],
            add_generation_prompt=not continued if wanted is None else wanted,
            continue_final_message=continued,
            variables=body.chat_template_kwargs or {},
        )
        # Templates write the special tokens themselves.
        special = bool(body.add_special_tokens)
        ids = await intake.encode(prompt, add_special_tokens=special)
        ask = replace(self._ask(call, parsed), prompt=ids.astype(np.int64))
        return _Prepared([ask], ChatWriter(**self._writer_fields(parsed, ask)))

    async def answer(self, call: Call, parsed: Parsed[Any], prepared: _Prepared) -> None:
        """Hand in the requests and write what comes."""
        stream = bool(parsed.body.stream)
        async with AsyncExitStack() as stack:
            answers = [
                await stack.enter_async_context(
                    self._desk.answering(
                        ask, call.headers, method=call.path, peer=call.peer, once=not stream
                    )
                )
                for ask in prepared.asks
            ]
            if stream:
                include_usage = parsed.include_usage
                await _stream(call, prepared.writer, answers, include_usage=include_usage)
            else:
                await _respond(call, prepared.writer, answers)

    def _ask(self, call: Call, parsed: Parsed[Any]) -> Ask:
        """What is the same for all prompts of a body."""
        body = parsed.body
        call.request_id = body.request_id or call.headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex
        return Ask(
            prompt=None,
            sampling=parsed.sampling,
            model=body.model or "",
            request_id=call.request_id,
            client=body.user or body.safety_identifier or "",
            priority=body.priority or 0,
            add_special_tokens=body.add_special_tokens is not False,
            cache_salt=body.cache_salt or "",
            group=body.group or "",
        )

    def _writer_fields(self, parsed: Parsed[Any], ask: Ask) -> dict[str, Any]:
        tokenizer = self._desk.text.tokenizer
        return {
            "model": self._desk.intake(ask.model).model,
            "request_id": ask.request_id,
            "token_bytes": (lambda token: None) if tokenizer is None else tokenizer.token_bytes,
            # Without a tokenizer ids are all there is.
            "with_ids": bool(parsed.body.return_token_ids) or tokenizer is None,
            "stop_ids": parsed.body.stop_token_ids or (),
            "usage_in_chunks": parsed.include_usage,
        }

    def _echo(self, prompt: str | np.ndarray) -> str:
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._desk.text.need_tokenizer("echo", True)
        vocab_size = self._desk.intake().limits.vocab_size
        # Ids that do not exist are refused by name a moment later.
        return tokenizer.decode([token for token in prompt.tolist() if 0 <= token < vocab_size])


@contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a request's fields get the body's names of them."""
    try:
        yield
    except BadRequest as error:
        name, bracket, rest = error.field.partition("[")
        if name not in names:
            raise
        raise error.renamed(names[name] + bracket + rest) from error


# ------------------------------------------------------------------------------------- answers


async def _respond(call: Call, writer: Writer, answers: list[Answer]) -> None:
    """The whole answer, once every sample of every prompt has ended."""
    choices: list[dict[str, Any]] = []
    for base, answer in _numbered(answers):
        messages = await answer.next_messages()
        await answer.next_messages()  # raises where the end was an error
        choices += [writer.choice(base + message.sample, message) for message in messages]
    await call.respond(writer.whole(choices, (answer.usage for answer in answers)))


async def _stream(
    call: Call, writer: Writer, answers: list[Answer], *, include_usage: bool
) -> None:
    """Events as they come, one per sample and slice, then perhaps the usage, then `[DONE]`.

    An error becomes an event too; then there is no `[DONE]`.
    """
    async for base, messages in _merged(answers):
        if not call.started:
            await call.begin_stream()
        await call.write_events(*(writer.chunk(base + part.sample, part) for part in messages))
    usage = _event(writer.usage_chunk(answer.usage for answer in answers)) if include_usage else b""
    await call.end_stream(usage + b"data: [DONE]\n\n")


def _numbered(answers: list[Answer]) -> list[tuple[int, Answer]]:
    """Each answer with the index of its first choice."""
    return [(place * answer.request.params.n, answer) for place, answer in enumerate(answers)]


async def _merged(answers: list[Answer]) -> AsyncIterator[tuple[int, Messages]]:
    """What the answers bring, with the index of the answer's first choice, in order of arrival."""
    if len(answers) == 1:
        while messages := await answers[0].next_messages():
            yield 0, messages
        return
    waiting = {
        asyncio.ensure_future(answer.next_messages()): (base, answer)
        for base, answer in _numbered(answers)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                base, answer = waiting.pop(task)
                if messages := task.result():
                    waiting[asyncio.ensure_future(answer.next_messages())] = base, answer
                    yield base, messages
    finally:
        for task in waiting:
            task.cancel()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
