"""The HTTP dialect: OpenAI's endpoints, health and metrics, as an ASGI application.

Calls are `http_call.py`'s, bodies `openai_schema.py`'s, answers `openai_answer.py`'s; what a
request becomes is the desk's. A stream's status line waits for its first tokens, so that a request
that is refused late, by a full queue for instance, still gets its own status.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from jaxserve import __version__
from jaxserve.errors import BadRequest, NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.answer import Answer
from jaxserve.server.desk import Desk
from jaxserve.server.http_call import REQUEST_ID_HEADER, Call, Endpoint, event, on_http_exception
from jaxserve.server.intake import Ask
from jaxserve.server.openai_answer import ChatWriter, CompletionWriter, Writer, says_something
from jaxserve.server.openai_schema import (
    ChatBody,
    CompletionBody,
    Parsed,
    parse_body,
    read_prompts,
)

Kind = TypeVar("Kind", CompletionBody, ChatBody)

Messages = list[pb.GenerateResponse]
Exposition = Callable[[], Awaitable[tuple[bytes, str]]]
"""Gives the metrics and their content type."""


def make_app(desk: Desk, *, max_body_bytes: int, exposition: Exposition) -> ASGIApp:
    """The application. Bodies longer than `max_body_bytes` are refused."""
    openai = _OpenAi(desk)

    def posted(
        kind: type[Kind], prepare: Callable[[Call, Parsed[Kind]], Awaitable["_Prepared"]]
    ) -> ASGIApp:
        async def run(call: Call) -> None:
            with desk.reading(method=call.path, peer=call.peer):
                desk.gate.identify(call.headers)  # before anything is read
                parsed = parse_body(kind, await call.body(max_body_bytes))
                with _renamed(parsed.names):
                    prepared = await prepare(call, parsed)
            with _renamed(parsed.names):
                await call.while_connected(openai.answer(call, parsed, prepared))

        return Endpoint(run)

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
            Route("/v1/models", Endpoint(models), methods=["GET"]),
            Route("/v1/models/{model:path}", Endpoint(model), methods=["GET"]),
            Route("/health", Endpoint(health), methods=["GET"]),
            Route("/version", Endpoint(version), methods=["GET"]),
            Route("/metrics", Endpoint(metrics), methods=["GET"]),
        ],
        exception_handlers={HTTPException: on_http_exception},
    )


def _model_body(desk: Desk) -> dict[str, Any]:
    model = desk.intake().described.model
    return {
        "id": model.model,
        "object": "model",
        "created": 0,
        "owned_by": "jaxserve",
        "max_model_len": model.max_context,
        "vocab_size": model.vocab_size,
    }


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
        parts = [part for part in messages if says_something(part)]
        if parts and not call.started:
            await call.begin_stream()
        if parts:
            await call.write_events(*(writer.chunk(base + part.sample, part) for part in parts))
    usage = event(writer.usage_chunk(answer.usage for answer in answers)) if include_usage else b""
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
