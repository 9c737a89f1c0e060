"""The official OpenAI client against a server: every parameter it has, and every one of our own.

A parameter is honoured, when the answer shows its effect; accepted, when it asks for nothing that
an answer could show; or refused with status 400 under its own name. None may be ignored. The names
are those of the client's signatures and of our bodies' fields, so that a release of either that
adds one fails here until a table below says what it means.

Every check runs through the blocking client, the asyncio client and its streams. Most compare their
answer with that of a reference request, which is sent once, so the three are held equal as well.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from rich.table import Table

from jaxserve.bench import openai_effects as effects
from jaxserve.bench.openai_asker import CHAT, COMPLETIONS, Asker, CheckFailed, Clients, Reply
from jaxserve.bench.openai_judging import (
    ACCEPTED,
    HONOURED,
    REFUSED,
    Check,
    Entry,
    accepted,
    equal,
    honoured,
    refused,
    refuses,
)
from jaxserve.server.openai_schema import ChatBody, CompletionBody

MODES: Final = ("sync", "async", "stream")
UNKNOWN: Final = "in no table"
BODIES: Final[dict[str, type[CompletionBody] | type[ChatBody]]] = {
    COMPLETIONS: CompletionBody,
    CHAT: ChatBody,
}

_TRANSPORT: Final = ("extra_headers", "extra_query", "extra_body", "timeout")
"""Arguments of the client's methods that are no parameters of a body."""

_AT_ONCE: Final = 8
"""Checks under way."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of one endpoint. `errors` maps the modes that failed to what went wrong."""

    parameter: str
    endpoint: str
    verdict: str
    modes: tuple[str, ...]
    errors: Mapping[str, str]


async def check_server(base_url: str, *, api_key: str, model: str) -> list[Row]:
    """Check all parameters against the server at `base_url`, "http://<host>:<port>/v1".

    `api_key` "" stands for a server without keys. The model must have a tokenizer and a chat
    template, and its greedy answers must be real text.
    """
    clients, strangers = (_make_clients(base_url, key) for key in (api_key or "none", "wrong"))
    turnstile = asyncio.Semaphore(_AT_ONCE)
    references: dict[str, asyncio.Task[Reply]] = {}
    rows: list[Row] = []
    runs: list[Coroutine[Any, Any, Row]] = []
    try:
        for endpoint, checks in _CHECKS.items():
            names = parameters(clients, endpoint)
            rows += [
                Row(name, endpoint, UNKNOWN, (), {"": "is it honoured, accepted or refused?"})
                for name in names
                if name not in checks
            ]
            checks = checks | {
                "(all null)": (ACCEPTED, partial(_check_nulls, names=names)),
                "(unknown one)": (REFUSED, partial(refuses, name="no_such_parameter", value=1)),
            }
            if api_key:
                checks |= {"(wrong key)": (REFUSED, partial(_check_key, strangers=strangers))}
            askers = [Asker(clients, endpoint, mode, model, references) for mode in MODES]
            runs += [
                _run(name, verdict, check, askers, turnstile)
                for name, (verdict, check) in checks.items()
            ]
        runs.append(_run_models(clients, model))
        return rows + await asyncio.gather(*runs)
    finally:
        await clients.close()
        await strangers.close()


def _make_clients(base_url: str, api_key: str) -> Clients:
    """Clients that try nothing twice."""
    import openai  # takes a second

    return Clients(
        openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0),
        openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0),
    )


def parameters(clients: Clients, endpoint: str) -> list[str]:
    """All that an endpoint takes: the arguments of the client's method and our body's fields."""
    theirs = inspect.signature(clients.method(endpoint, blocking=True)).parameters
    ours = BODIES[endpoint].__struct_fields__
    return [name for name in dict.fromkeys([*theirs, *ours]) if name not in _TRANSPORT]


def make_table(rows: Iterable[Row]) -> Table:
    """One line per parameter: its verdict, and a mark for every mode."""
    table = Table("parameter", "endpoint", "verdict", *MODES)
    for row in rows:
        marks = [
            "" if mode not in row.modes else "FAILED" if mode in row.errors else "ok"
            for mode in MODES
        ]
        table.add_row(row.parameter, row.endpoint, row.verdict, *marks)
    return table


def failures(rows: Iterable[Row]) -> list[str]:
    """A line for everything that went wrong."""
    return [
        f"{row.endpoint} {row.parameter} {mode}: {error}"
        for row in rows
        for mode, error in row.errors.items()
    ]


async def _run(
    name: str,
    verdict: str,
    check: Check,
    askers: list[Asker],
    turnstile: asyncio.Semaphore,
) -> Row:
    async def error_of(asker: Asker) -> str:
        async with turnstile:
            return await _error_of(check(asker))

    found = await asyncio.gather(*map(error_of, askers))
    errors = {asker.mode: error for asker, error in zip(askers, found, strict=True) if error}
    return Row(name, askers[0].endpoint, verdict, MODES, errors)


async def _error_of(check: Awaitable[None]) -> str:
    try:
        await check
    except CheckFailed as error:
        return str(error)
    except Exception as error:  # whatever an answer lacks, and whatever the client says of it
        return f"{type(error).__name__}: {error}"
    return ""


async def _run_models(clients: Clients, model: str) -> Row:
    """The list of models, and one of them."""
    import openai

    async def check_async() -> None:
        equal("models", [each.id async for each in clients.asyncio.models.list()], [model])
        equal("model", (await clients.asyncio.models.retrieve(model)).id, model)
        try:
            await clients.asyncio.models.retrieve("no-such-model")
        except openai.NotFoundError as error:
            equal("code", error.code, "model_not_found")
        else:
            raise CheckFailed("an unknown model was found")

    async def check_sync() -> None:
        found = await asyncio.to_thread(
            lambda: [each.id for each in clients.blocking.models.list()]
        )
        equal("models", found, [model])

    errors = {"async": await _error_of(check_async()), "sync": await _error_of(check_sync())}
    errors = {mode: error for mode, error in errors.items() if error}
    return Row("(list, retrieve)", "models", HONOURED, ("sync", "async"), errors)


async def _check_nulls(ask: Asker, *, names: list[str]) -> None:
    """Null means absent, whatever the parameter."""
    kept = ("model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options")
    nulls = {name: None for name in names if name not in kept}
    equal("text", (await ask(**nulls)).text, (await ask.reference()).text)


async def _check_key(ask: Asker, *, strangers: Clients) -> None:
    import openai

    try:
        await ask.with_clients(strangers)()
    except openai.AuthenticationError as error:
        equal("code", error.code, "invalid_api_key")
        return
    raise CheckFailed("a wrong key was let in")


# ---------------------------------------------------------------------------------- the tables

_TOOL: Final = {"name": "look", "parameters": {"type": "object", "properties": {}}}
_SCHEMA: Final = {"name": "answer", "schema": {"type": "object", "properties": {}}}

_BOTH: Final[dict[str, Entry]] = {
    "model": honoured(effects.check_model),
    "stream": honoured(effects.check_stream),
    "stream_options": honoured(effects.check_stream_options),
    "max_tokens": honoured(effects.check_length("max_tokens")),
    "temperature": honoured(effects.check_temperature),
    "top_p": honoured(effects.as_greedy("top_p", 1e-6, 0.0, 1.5)),
    "n": honoured(effects.check_n),
    "stop": honoured(effects.check_stop),
    "seed": honoured(effects.check_seed),
    "presence_penalty": honoured(effects.check_penalty("presence_penalty", 2.0, 3.0)),
    "frequency_penalty": honoured(effects.check_penalty("frequency_penalty", 2.0, -3.0)),
    "logit_bias": honoured(effects.check_logit_bias),
    "user": accepted("user", values=("someone",), wrong=5),
    "safety_identifier": accepted("safety_identifier", values=("someone",), wrong=5),
    "prompt_cache_key": accepted("prompt_cache_key", values=("talk",), wrong=5),
    "store": refused("store", True, neutral=(False,)),
    "metadata": refused("metadata", {"topic": "kings"}, neutral=({},)),
    "service_tier": refused(
        "service_tier", "flex", "scale", "priority", "fast", neutral=("auto", "default")
    ),
    "prompt_cache_retention": refused("prompt_cache_retention", "in_memory", "24h"),
    # Not OpenAI's.
    "top_k": honoured(effects.as_greedy("top_k", 1, -2)),
    "min_p": honoured(effects.as_greedy("min_p", 1.0, -1.0, 2.0)),
    "repetition_penalty": honoured(effects.check_penalty("repetition_penalty", 1.5, 0.0)),
    "min_tokens": honoured(effects.check_min_tokens),
    "ignore_eos": honoured(effects.check_ignore_eos),
    "stop_token_ids": honoured(effects.check_stop_token_ids),
    "include_stop_str_in_output": honoured(effects.check_include_stop),
    "prompt_logprobs": refused("prompt_logprobs", 0, 3),
    "priority": accepted("priority", values=(0, 1, -1), wrong=10**9),
    "request_id": honoured(effects.check_request_id),
    "cache_salt": honoured(effects.check_cache_salt),
    "group": accepted("group", values=("friends",), wrong=5),
    "return_token_ids": honoured(effects.check_return_token_ids),
    "add_special_tokens": accepted("add_special_tokens", values=(False,), wrong=5),
    "session_id": accepted("session_id", values=("talk",), wrong=5),
}
_CHECKS: Final[dict[str, dict[str, Entry]]] = {
    COMPLETIONS: _BOTH
    | {
        "prompt": honoured(effects.check_prompt),
        "echo": honoured(effects.check_echo),
        "best_of": honoured(effects.check_best_of),
        "logprobs": honoured(effects.check_logprobs),
        "suffix": refused("suffix", " Exit.", neutral=("",)),
    },
    CHAT: _BOTH
    | {
        "messages": honoured(effects.check_messages),
        "max_tokens": honoured(effects.check_max_tokens_of_chat),
        "max_completion_tokens": honoured(effects.check_length("max_completion_tokens")),
        "logprobs": honoured(effects.check_chat_logprobs),
        "top_logprobs": honoured(effects.check_top_logprobs),
        "add_generation_prompt": honoured(effects.check_add_generation_prompt),
        "continue_final_message": honoured(effects.check_continue_final_message),
        "chat_template_kwargs": accepted(
            "chat_template_kwargs", values=({"mood": "dark"},), wrong={"messages": []}
        ),
        "parallel_tool_calls": accepted("parallel_tool_calls", values=(True, False), wrong="yes"),
        "tools": refused("tools", [{"type": "function", "function": _TOOL}], neutral=([],)),
        "tool_choice": refused(
            "tool_choice",
            "required",
            {"type": "function", "function": {"name": "look"}},
            neutral=("none", "auto"),
        ),
        "functions": refused("functions", [_TOOL], neutral=([],)),
        "function_call": refused("function_call", {"name": "look"}, neutral=("none", "auto")),
        "response_format": refused(
            "response_format",
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": _SCHEMA},
            neutral=({"type": "text"},),
        ),
        "modalities": refused("modalities", ["text", "audio"], ["audio"], neutral=(["text"],)),
        "audio": refused("audio", {"voice": "alloy", "format": "wav"}),
        "prediction": refused("prediction", {"type": "content", "content": "A king."}),
        "reasoning_effort": refused("reasoning_effort", "none", "low", "high"),
        "verbosity": refused("verbosity", "low", "medium", "high"),
        "web_search_options": refused("web_search_options", {}, {"search_context_size": "low"}),
        "moderation": refused("moderation", {"model": "omni-moderation-latest"}),
        "prompt_cache_options": refused("prompt_cache_options", {"mode": "explicit"}),
    },
}
