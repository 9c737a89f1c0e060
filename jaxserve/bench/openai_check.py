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
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from rich.table import Table

from jaxserve.bench.openai_asker import (
    ABSENT,
    CHAT,
    COMPLETIONS,
    Asker,
    CheckFailed,
    Clients,
    Reply,
    said_by,
)
from jaxserve.server.openai_schema import ChatBody, CompletionBody

MODES: Final = ("sync", "async", "stream")
HONOURED: Final = "honoured"
ACCEPTED: Final = "accepted"
REFUSED: Final = "refused"
UNKNOWN: Final = "in no table"
BODIES: Final[dict[str, type[CompletionBody] | type[ChatBody]]] = {
    COMPLETIONS: CompletionBody,
    CHAT: ChatBody,
}

_TRANSPORT: Final = ("extra_headers", "extra_query", "extra_body", "timeout")
"""Arguments of the client's methods that are no parameters of a body."""

_AT_ONCE: Final = 8
"""Checks under way."""

_LONG_TEXT: Final = "\n\n".join(
    f"Scene {number}. A street before the palace." for number in range(16)
)
"""Longer than a page of KV memory."""


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
                "(unknown one)": (REFUSED, partial(_refuses, name="no_such_parameter", value=1)),
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
    check: "Check",
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
        _equal("models", [each.id async for each in clients.asyncio.models.list()], [model])
        _equal("model", (await clients.asyncio.models.retrieve(model)).id, model)
        try:
            await clients.asyncio.models.retrieve("no-such-model")
        except openai.NotFoundError as error:
            _equal("code", error.code, "model_not_found")
        else:
            raise CheckFailed("an unknown model was found")

    async def check_sync() -> None:
        found = await asyncio.to_thread(
            lambda: [each.id for each in clients.blocking.models.list()]
        )
        _equal("models", found, [model])

    errors = {"async": await _error_of(check_async()), "sync": await _error_of(check_sync())}
    errors = {mode: error for mode, error in errors.items() if error}
    return Row("(list, retrieve)", "models", HONOURED, ("sync", "async"), errors)


# ----------------------------------------------------------------------------- how checks judge

Check = Callable[[Asker], Awaitable[None]]


def _equal(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise CheckFailed(f"{what}: got {got!r}, wanted {wanted!r}")


def _true(holds: bool, text: str) -> None:
    if not holds:
        raise CheckFailed(text)


async def _refuses(ask: Asker, name: str, value: object, **others: Any) -> None:
    """Hold that `value` is refused under the parameter's name, or that of a part of it."""
    import openai

    try:
        await ask(**{**others, name: value})
    except openai.BadRequestError as error:
        body = error.response.json()
        _equal("the body's fields", list(body), ["error"])
        _equal("the error's fields", sorted(body["error"]), ["code", "message", "param", "type"])
        _equal("type", error.type, "invalid_request_error")
        part = (error.param or "").startswith((f"{name}.", f"{name}["))
        _true(error.param == name or part, f"param: got {error.param!r} for {name}={value!r}")
        return
    raise CheckFailed(f"{name}={value!r} was not refused")


async def _changes_nothing(ask: Asker, name: str, value: object, **others: Any) -> None:
    """Hold that the answer is the one without the parameter."""
    plain = await ask.reference(**others)
    _equal(f"text with {name}={value!r}", (await ask(**{**others, name: value})).text, plain.text)


def _accepted(name: str, *, values: tuple[object, ...], wrong: object) -> "Entry":
    """A parameter that changes no answer. That `wrong` is refused shows that it is read."""

    async def check(ask: Asker) -> None:
        for value in values:
            await _changes_nothing(ask, name, value)
        await _refuses(ask, name, wrong)

    return ACCEPTED, check


def _refused(name: str, *values: object, neutral: tuple[object, ...] = ()) -> "Entry":
    """A parameter that is refused, but for the values that ask for nothing."""

    async def check(ask: Asker) -> None:
        for value in values:
            await _refuses(ask, name, value)
        for value in (*neutral, None):
            await _changes_nothing(ask, name, value)

    return REFUSED, check


def _honoured(check: Check) -> "Entry":
    return HONOURED, check


# --------------------------------------------------------------------------- checks of a run


async def _check_nulls(ask: Asker, *, names: list[str]) -> None:
    """Null means absent, whatever the parameter."""
    kept = ("model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options")
    nulls = {name: None for name in names if name not in kept}
    _equal("text", (await ask(**nulls)).text, (await ask.reference()).text)


async def _check_key(ask: Asker, *, strangers: Clients) -> None:
    import openai

    try:
        await ask.with_clients(strangers)()
    except openai.AuthenticationError as error:
        _equal("code", error.code, "invalid_api_key")
        return
    raise CheckFailed("a wrong key was let in")


# --------------------------------------------------------------------- checks of both endpoints


async def _check_model(ask: Asker) -> None:
    import openai

    _equal("model", (await ask()).model, ask.model)
    try:
        await ask(model="no-such-model")
    except openai.NotFoundError as error:
        _equal("param and code", (error.param, error.code), ("model", "model_not_found"))
    else:
        raise CheckFailed("an unknown model was let in")


async def _check_stream(ask: Asker) -> None:
    """Whole and in parts, greedy and seeded, the answers are equal."""
    drawn: dict[str, Any] = {"temperature": 1, "seed": 7}
    for fields in ({}, drawn):
        wanted = await ask.reference(max_tokens=32, **fields)
        for stream in (False, True):
            got = await ask(max_tokens=32, stream=stream, stream_options=ABSENT, **fields)
            _equal("text", got.text, wanted.text)
            _equal("finish_reason", got.finish_reason, wanted.finish_reason)
            _equal("whether there is a usage", got.usage is not None, not stream)
    await _refuses(ask, "stream", "yes", stream_options=ABSENT)


async def _check_stream_options(ask: Asker) -> None:
    reply = await ask(stream=True, stream_options={"include_usage": True})
    _true(reply.ends_with_usage, "the usage is not the last chunk, alone and without choices")
    _equal("completion_tokens", reply.count("completion_tokens"), 8)
    _true(reply.count("cached_tokens") >= 0, "cached_tokens is negative")
    wanted = await ask.reference()
    _equal("usage", reply.count("prompt_tokens"), wanted.count("prompt_tokens"))
    reply = await ask(stream=True, stream_options={"include_usage": False})
    _equal("usage", reply.usage, None)
    await _refuses(ask, "stream_options", {"include_usage": True}, stream=False)
    await _refuses(ask, "stream_options", {"include_obfuscation": True}, stream=True)


def _check_length(name: str) -> Check:
    async def check(ask: Asker) -> None:
        beside: dict[str, Any] = {"max_tokens": ABSENT} if name != "max_tokens" else {}
        reply = await ask(**beside, **{name: 5}, return_token_ids=True)
        _equal("tokens", len(reply.token_ids), 5)
        _equal("completion_tokens", reply.count("completion_tokens"), 5)
        _equal("finish_reason", reply.finish_reason, "length")
        for wrong in (-1, 0, 10**9):
            await _refuses(ask, name, wrong, **beside)

    return check


async def _check_temperature(ask: Asker) -> None:
    greedy = await ask.reference()
    _equal("text at temperature 0", (await ask(temperature=0, seed=3)).text, greedy.text)
    drawn = await ask(temperature=2, seed=3)
    _true(drawn.text != greedy.text, "temperature 2 gives the greedy text")
    for wrong in (-1, 101, "hot"):
        await _refuses(ask, "temperature", wrong)


def _as_greedy(name: str, value: int | float, *wrong: int | float) -> Check:
    """A filter that leaves the likeliest token alone."""

    async def check(ask: Asker) -> None:
        drawn = await ask.reference(temperature=2, seed=3)
        greedy = await ask.reference()
        _true(drawn.text != greedy.text, "temperature 2 gives the greedy text")
        filtered = await ask(temperature=2, seed=3, **{name: value})
        _equal("text", filtered.text, greedy.text)
        for refused in wrong:
            await _refuses(ask, name, refused)

    return check


async def _check_n(ask: Asker) -> None:
    reply = await ask(n=3, temperature=1, seed=5)
    _equal("indices", sorted(reply.choices), [0, 1, 2])
    texts = [choice.text for choice in reply.choices.values()]
    _equal("different texts", len(set(texts)), 3)
    _true(reply.count("completion_tokens") > 8, "usage counts one choice only")
    await _refuses(ask, "n", 0)
    await _refuses(ask, "n", 10**6)


async def _check_stop(ask: Asker) -> None:
    whole = (await ask.reference(max_tokens=24)).text
    stop = whole[len(whole) // 2 :][:3]
    for given in (stop, ["no such text", stop]):
        reply = await ask(max_tokens=24, stop=given)
        _equal("text", reply.text, whole[: whole.index(stop)])
        _equal("finish_reason", reply.finish_reason, "stop")
        _equal("stop_reason", reply.choices[0].stop_reason, stop)
    await _refuses(ask, "stop", 5)
    await _refuses(ask, "stop", ["x"] * 17)


async def _check_include_stop(ask: Asker) -> None:
    whole = (await ask.reference(max_tokens=24)).text
    stop = whole[len(whole) // 2 :][:3]
    reply = await ask(max_tokens=24, stop=stop, include_stop_str_in_output=True)
    _equal("text", reply.text, whole[: whole.index(stop)] + stop)


async def _check_stop_token_ids(ask: Asker) -> None:
    ids = (await ask.reference(return_token_ids=True)).token_ids
    reply = await ask(stop_token_ids=[ids[2]], return_token_ids=True)
    _equal("token_ids", reply.token_ids, ids[: ids.index(ids[2]) + 1])
    _equal("finish_reason", reply.finish_reason, "stop")
    _equal("stop_reason", reply.choices[0].stop_reason, ids[2])
    await _refuses(ask, "stop_token_ids", [-1])


async def _check_min_tokens(ask: Asker) -> None:
    ids = (await ask.reference(return_token_ids=True)).token_ids
    at_once = await ask.reference(stop_token_ids=ids[:1])
    _equal("tokens without it", at_once.count("completion_tokens"), 1)
    reply = await ask(stop_token_ids=ids[:1], min_tokens=6, return_token_ids=True)
    _true(len(reply.token_ids) >= 6, f"{len(reply.token_ids)} tokens with min_tokens=6")
    await _refuses(ask, "min_tokens", -1)


async def _check_ignore_eos(ask: Asker) -> None:
    """The model's own end, forced at once, ends an answer or does not."""
    ended = await ask.reference(max_tokens=256, return_token_ids=True)
    _equal("finish_reason of a long answer", ended.finish_reason, "stop")
    forced = {"logit_bias": {str(ended.token_ids[-1]): 100}, "return_token_ids": True}
    reply = await ask(**forced)
    _equal("tokens and finish_reason", (len(reply.token_ids), reply.finish_reason), (1, "stop"))
    reply = await ask(**forced, ignore_eos=True)
    _equal("tokens and finish_reason", (len(reply.token_ids), reply.finish_reason), (8, "length"))
    await _refuses(ask, "ignore_eos", "yes")


async def _check_seed(ask: Asker) -> None:
    wanted = await ask.reference(temperature=1, seed=1, max_tokens=16)
    _equal("text", (await ask(temperature=1, seed=1, max_tokens=16)).text, wanted.text)
    other = await ask(temperature=1, seed=2, max_tokens=16)
    _true(other.text != wanted.text, "seeds 1 and 2 give the same text")
    await _refuses(ask, "seed", -1)


def _check_penalty(name: str, value: float, wrong: float) -> Check:
    async def check(ask: Asker) -> None:
        fields: dict[str, Any] = {"max_tokens": 48, "ignore_eos": True, "return_token_ids": True}
        plain = await ask.reference(**fields)
        reply = await ask(**fields, **{name: value})
        counts = len(set(reply.token_ids)), len(set(plain.token_ids))
        _true(counts[0] > counts[1], f"different tokens with and without it: {counts}")
        await _refuses(ask, name, wrong)

    return check


async def _check_logit_bias(ask: Asker) -> None:
    token = (await ask.reference(return_token_ids=True)).token_ids[3]
    reply = await ask(logit_bias={str(token): 100}, return_token_ids=True)
    _equal("token_ids", reply.token_ids, [token] * 8)
    reply = await ask(logit_bias={str(token): -100}, return_token_ids=True)
    _true(token not in reply.token_ids, f"token {token} in spite of a bias of -100")
    for wrong in ({"word": 1}, {"1": 101}, {str(2**31): 1}):
        await _refuses(ask, "logit_bias", wrong)


def _judge_tokens(reply: Reply, *, num_top: int) -> None:
    """A greedy answer's log-probabilities, with those of `num_top` others at each place."""
    tokens = reply.choices[0].tokens
    _equal("text of the tokens", "".join(token.text for token in tokens), reply.text)
    for token in tokens:
        _equal("number of likeliest tokens", len(token.top), num_top)
        _true(token.logprob <= 0, f"log-probability {token.logprob}")
        if num_top:
            _equal("the likeliest token", token.top[0], (token.text, token.logprob))
            values = [logprob for _, logprob in token.top]
            _equal("order", values, sorted(values, reverse=True))


async def _check_request_id(ask: Asker) -> None:
    mine = f"check-{uuid.uuid4().hex}"
    reply = await ask(request_id=mine)
    _equal("end of the id", reply.id[-len(mine) :], mine)
    _equal("X-Request-Id", reply.header_id, mine)
    reply = await ask(extra_headers={"X-Request-Id": f"{mine}-header"})
    _equal("X-Request-Id, sent as a header", reply.header_id, f"{mine}-header")
    first, second = (await ask()).header_id, (await ask()).header_id
    _true(bool(first) and first != second, "requests without an id have no id of their own")
    await _refuses(ask, "request_id", "ä")


async def _check_cache_salt(ask: Asker) -> None:
    """Pages are found again by whoever has the salt that they were made with, or none as well."""
    said = ask.prompt(f"{uuid.uuid4().hex}\n\n{_LONG_TEXT}")

    async def cached(**fields: Any) -> bool:
        return (await ask(**said, **fields, max_tokens=1)).count("cached_tokens") > 0

    if ask.mode == "stream":
        said |= {"stream_options": {"include_usage": True}}
    found = [await cached(), await cached()]
    found += [await cached(cache_salt="pepper"), await cached(cache_salt="pepper")]
    _equal("cached: first, again, salted, salted again", found, [False, True, False, True])
    await _refuses(ask, "cache_salt", 5)


async def _check_return_token_ids(ask: Asker) -> None:
    reply = await ask(return_token_ids=True)
    _equal("token ids", len(reply.token_ids), reply.count("completion_tokens"))
    reply = await ask(return_token_ids=False)
    _equal("token ids", reply.choices[0].token_ids, None)
    await _refuses(ask, "return_token_ids", 5)


# --------------------------------------------------------------------- checks of /completions


async def _check_prompt(ask: Asker) -> None:
    """A text, token ids, and several of either."""
    ids = (await ask.reference(return_token_ids=True)).token_ids
    prompts = ["ROMEO:", "JULIET:"]
    alone = [(await ask.reference(prompt=prompt)).text for prompt in prompts]
    _true(alone[0] != alone[1], "two prompts have the same answer")
    reply = await ask(prompt=prompts)
    _equal("texts", [reply.choices[place].text for place in (0, 1)], alone)
    wanted = (await ask.reference(prompt=ids)).text
    reply = await ask(prompt=[ids, ids], n=2)
    _equal("texts of ids", [reply.choices[place].text for place in range(4)], [wanted] * 4)
    for wrong in ("", [], [-1], [2**40], 5, [["text"]]):
        await _refuses(ask, "prompt", wrong)


async def _check_echo(ask: Asker) -> None:
    plain = await ask.reference()
    _equal("text", (await ask(echo=True)).text, "ROMEO:" + plain.text)
    await _refuses(ask, "echo", True, logprobs=1)


async def _check_best_of(ask: Asker) -> None:
    """As many as are given are drawn; more would be thrown away, and are refused."""
    reply = await ask(best_of=2, n=2)
    _equal("indices", sorted(reply.choices), [0, 1])
    await _refuses(ask, "best_of", 3)


async def _check_logprobs(ask: Asker) -> None:
    for num_top in (0, 3):
        reply = await ask(logprobs=num_top)
        _judge_tokens(reply, num_top=num_top)
        choice, offset = reply.choices[0], 0
        for token, place in zip(choice.tokens, choice.text_offsets, strict=True):
            _equal("text_offset", place, offset)
            offset += len(token.text)
    await _refuses(ask, "logprobs", 21)


# ---------------------------------------------------------------- checks of /chat/completions


async def _check_messages(ask: Asker) -> None:
    plain = await ask.reference()
    user = said_by("user", "Who art thou?")
    parts = said_by(
        "user", [{"type": "text", "text": "Who art "}, {"type": "text", "text": "thou?"}]
    )
    _equal("text of parts", (await ask(messages=[parts])).text, plain.text)
    asked = [
        await ask(messages=[said_by(role, "A dungeon."), user]) for role in ("system", "developer")
    ]
    _equal("text after system and developer", asked[0].text, asked[1].text)
    _true(asked[0].count("prompt_tokens") > plain.count("prompt_tokens"), "system is not read")
    longer = await ask(messages=[user, said_by("assistant", "A king."), user])
    _true(longer.count("prompt_tokens") > plain.count("prompt_tokens"), "history is not read")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    for wrong in (
        [],
        "Who art thou?",
        [said_by("king", "I")],
        [said_by("tool", "I")],
        [said_by("user", [picture])],
        [user | {"tool_calls": []}],
    ):
        await _refuses(ask, "messages", wrong)


async def _check_max_tokens_of_chat(ask: Asker) -> None:
    await _check_length("max_tokens")(ask)
    await _refuses(ask, "max_tokens", 4, max_completion_tokens=5)


async def _check_chat_logprobs(ask: Asker) -> None:
    _judge_tokens(await ask(logprobs=True), num_top=0)
    _equal("log-probabilities", (await ask(logprobs=False)).choices[0].tokens, [])
    await _refuses(ask, "logprobs", 3)


async def _check_top_logprobs(ask: Asker) -> None:
    _judge_tokens(await ask(logprobs=True, top_logprobs=3), num_top=3)
    await _refuses(ask, "top_logprobs", 3)
    await _refuses(ask, "top_logprobs", 21, logprobs=True)


async def _check_add_generation_prompt(ask: Asker) -> None:
    plain = await ask.reference()
    _equal("text", (await ask(add_generation_prompt=True)).text, plain.text)
    bare = await ask(add_generation_prompt=False)
    _true(bare.count("prompt_tokens") < plain.count("prompt_tokens"), "the prompt is no shorter")


async def _check_continue_final_message(ask: Asker) -> None:
    messages = [said_by("user", "Who art thou?"), said_by("assistant", "I am the")]
    closed = await ask.reference(messages=messages)
    open_ = await ask(messages=messages, continue_final_message=True)
    _true(open_.count("prompt_tokens") < closed.count("prompt_tokens"), "the message is closed")
    _true(open_.text != closed.text, "the text is that of a new message")
    await _refuses(ask, "continue_final_message", True, add_generation_prompt=True)


# ---------------------------------------------------------------------------------- the tables

Entry = tuple[str, Check]

_TOOL: Final = {"name": "look", "parameters": {"type": "object", "properties": {}}}
_SCHEMA: Final = {"name": "answer", "schema": {"type": "object", "properties": {}}}

_BOTH: Final[dict[str, Entry]] = {
    "model": _honoured(_check_model),
    "stream": _honoured(_check_stream),
    "stream_options": _honoured(_check_stream_options),
    "max_tokens": _honoured(_check_length("max_tokens")),
    "temperature": _honoured(_check_temperature),
    "top_p": _honoured(_as_greedy("top_p", 1e-6, 0.0, 1.5)),
    "n": _honoured(_check_n),
    "stop": _honoured(_check_stop),
    "seed": _honoured(_check_seed),
    "presence_penalty": _honoured(_check_penalty("presence_penalty", 2.0, 3.0)),
    "frequency_penalty": _honoured(_check_penalty("frequency_penalty", 2.0, -3.0)),
    "logit_bias": _honoured(_check_logit_bias),
    "user": _accepted("user", values=("someone",), wrong=5),
    "safety_identifier": _accepted("safety_identifier", values=("someone",), wrong=5),
    "prompt_cache_key": _accepted("prompt_cache_key", values=("talk",), wrong=5),
    "store": _refused("store", True, neutral=(False,)),
    "metadata": _refused("metadata", {"topic": "kings"}, neutral=({},)),
    "service_tier": _refused(
        "service_tier", "flex", "scale", "priority", "fast", neutral=("auto", "default")
    ),
    "prompt_cache_retention": _refused("prompt_cache_retention", "in_memory", "24h"),
    # Not OpenAI's.
    "top_k": _honoured(_as_greedy("top_k", 1, -2)),
    "min_p": _honoured(_as_greedy("min_p", 1.0, -1.0, 2.0)),
    "repetition_penalty": _honoured(_check_penalty("repetition_penalty", 1.5, 0.0)),
    "min_tokens": _honoured(_check_min_tokens),
    "ignore_eos": _honoured(_check_ignore_eos),
    "stop_token_ids": _honoured(_check_stop_token_ids),
    "include_stop_str_in_output": _honoured(_check_include_stop),
    "prompt_logprobs": _refused("prompt_logprobs", 0, 3),
    "priority": _accepted("priority", values=(0, 1, -1), wrong=10**9),
    "request_id": _honoured(_check_request_id),
    "cache_salt": _honoured(_check_cache_salt),
    "group": _accepted("group", values=("friends",), wrong=5),
    "return_token_ids": _honoured(_check_return_token_ids),
    "add_special_tokens": _accepted("add_special_tokens", values=(False,), wrong=5),
    "session_id": _accepted("session_id", values=("talk",), wrong=5),
}
_CHECKS: Final[dict[str, dict[str, Entry]]] = {
    COMPLETIONS: _BOTH
    | {
        "prompt": _honoured(_check_prompt),
        "echo": _honoured(_check_echo),
        "best_of": _honoured(_check_best_of),
        "logprobs": _honoured(_check_logprobs),
        "suffix": _refused("suffix", " Exit.", neutral=("",)),
    },
    CHAT: _BOTH
    | {
        "messages": _honoured(_check_messages),
        "max_tokens": _honoured(_check_max_tokens_of_chat),
        "max_completion_tokens": _honoured(_check_length("max_completion_tokens")),
        "logprobs": _honoured(_check_chat_logprobs),
        "top_logprobs": _honoured(_check_top_logprobs),
        "add_generation_prompt": _honoured(_check_add_generation_prompt),
        "continue_final_message": _honoured(_check_continue_final_message),
        "chat_template_kwargs": _accepted(
            "chat_template_kwargs", values=({"mood": "dark"},), wrong={"messages": []}
        ),
        "parallel_tool_calls": _accepted("parallel_tool_calls", values=(True, False), wrong="yes"),
        "tools": _refused("tools", [{"type": "function", "function": _TOOL}], neutral=([],)),
        "tool_choice": _refused(
            "tool_choice",
            "required",
            {"type": "function", "function": {"name": "look"}},
            neutral=("none", "auto"),
        ),
        "functions": _refused("functions", [_TOOL], neutral=([],)),
        "function_call": _refused("function_call", {"name": "look"}, neutral=("none", "auto")),
        "response_format": _refused(
            "response_format",
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": _SCHEMA},
            neutral=({"type": "text"},),
        ),
        "modalities": _refused("modalities", ["text", "audio"], ["audio"], neutral=(["text"],)),
        "audio": _refused("audio", {"voice": "alloy", "format": "wav"}),
        "prediction": _refused("prediction", {"type": "content", "content": "A king."}),
        "reasoning_effort": _refused("reasoning_effort", "none", "low", "high"),
        "verbosity": _refused("verbosity", "low", "medium", "high"),
        "web_search_options": _refused("web_search_options", {}, {"search_context_size": "low"}),
        "moderation": _refused("moderation", {"model": "omni-moderation-latest"}),
        "prompt_cache_options": _refused("prompt_cache_options", {"mode": "explicit"}),
    },
}
