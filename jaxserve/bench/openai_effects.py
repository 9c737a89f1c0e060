"""What each parameter of OpenAI's endpoints does to an answer, as a check of its own.

Most compare an answer with that of a reference request, which is sent once. The table of
openai_check.py says which parameter has which.
"""

import uuid
from typing import Any, Final

from jaxserve.bench.openai_asker import ABSENT, Asker, CheckFailed, Reply, said_by
from jaxserve.bench.openai_judging import Check, equal, hold, refuses

_LONG_TEXT: Final = "\n\n".join(
    f"Scene {number}. A street before the palace." for number in range(16)
)
"""Longer than a page of KV memory."""


# --------------------------------------------------------------------- checks of both endpoints


async def check_model(ask: Asker) -> None:
    import openai

    equal("model", (await ask()).model, ask.model)
    try:
        await ask(model="no-such-model")
    except openai.NotFoundError as error:
        equal("param and code", (error.param, error.code), ("model", "model_not_found"))
    else:
        raise CheckFailed("an unknown model was let in")


async def check_stream(ask: Asker) -> None:
    """Whole and in parts, greedy and seeded, the answers are equal."""
    drawn: dict[str, Any] = {"temperature": 1, "seed": 7}
    for fields in ({}, drawn):
        wanted = await ask.reference(max_tokens=32, **fields)
        for stream in (False, True):
            got = await ask(max_tokens=32, stream=stream, stream_options=ABSENT, **fields)
            equal("text", got.text, wanted.text)
            equal("finish_reason", got.finish_reason, wanted.finish_reason)
            equal("whether there is a usage", got.usage is not None, not stream)
    await refuses(ask, "stream", "yes", stream_options=ABSENT)


async def check_stream_options(ask: Asker) -> None:
    reply = await ask(stream=True, stream_options={"include_usage": True})
    hold(reply.ends_with_usage, "the usage is not the last chunk, alone and without choices")
    equal("completion_tokens", reply.count("completion_tokens"), 8)
    hold(reply.count("cached_tokens") >= 0, "cached_tokens is negative")
    wanted = await ask.reference()
    equal("usage", reply.count("prompt_tokens"), wanted.count("prompt_tokens"))
    reply = await ask(stream=True, stream_options={"include_usage": False})
    equal("usage", reply.usage, None)
    await refuses(ask, "stream_options", {"include_usage": True}, stream=False)
    await refuses(ask, "stream_options", {"include_obfuscation": True}, stream=True)


def check_length(name: str) -> Check:
    async def check(ask: Asker) -> None:
        beside: dict[str, Any] = {"max_tokens": ABSENT} if name != "max_tokens" else {}
        reply = await ask(**beside, **{name: 5}, return_token_ids=True)
        equal("tokens", len(reply.token_ids), 5)
        equal("completion_tokens", reply.count("completion_tokens"), 5)
        equal("finish_reason", reply.finish_reason, "length")
        for wrong in (-1, 0, 10**9):
            await refuses(ask, name, wrong, **beside)

    return check


async def check_temperature(ask: Asker) -> None:
    greedy = await ask.reference()
    equal("text at temperature 0", (await ask(temperature=0, seed=3)).text, greedy.text)
    drawn = await ask(temperature=2, seed=3)
    hold(drawn.text != greedy.text, "temperature 2 gives the greedy text")
    for wrong in (-1, 101, "hot"):
        await refuses(ask, "temperature", wrong)


def as_greedy(name: str, value: int | float, *wrong: int | float) -> Check:
    """A filter that leaves the likeliest token alone."""

    async def check(ask: Asker) -> None:
        drawn = await ask.reference(temperature=2, seed=3)
        greedy = await ask.reference()
        hold(drawn.text != greedy.text, "temperature 2 gives the greedy text")
        filtered = await ask(temperature=2, seed=3, **{name: value})
        equal("text", filtered.text, greedy.text)
        for refused in wrong:
            await refuses(ask, name, refused)

    return check


async def check_n(ask: Asker) -> None:
    reply = await ask(n=3, temperature=1, seed=5)
    equal("indices", sorted(reply.choices), [0, 1, 2])
    texts = [choice.text for choice in reply.choices.values()]
    equal("different texts", len(set(texts)), 3)
    hold(reply.count("completion_tokens") > 8, "usage counts one choice only")
    await refuses(ask, "n", 0)
    await refuses(ask, "n", 10**6)


async def check_stop(ask: Asker) -> None:
    whole = (await ask.reference(max_tokens=24)).text
    stop = whole[len(whole) // 2 :][:3]
    for given in (stop, ["no such text", stop]):
        reply = await ask(max_tokens=24, stop=given)
        equal("text", reply.text, whole[: whole.index(stop)])
        equal("finish_reason", reply.finish_reason, "stop")
        equal("stop_reason", reply.choices[0].stop_reason, stop)
    await refuses(ask, "stop", 5)
    await refuses(ask, "stop", ["x"] * 17)


async def check_include_stop(ask: Asker) -> None:
    whole = (await ask.reference(max_tokens=24)).text
    stop = whole[len(whole) // 2 :][:3]
    reply = await ask(max_tokens=24, stop=stop, include_stop_str_in_output=True)
    equal("text", reply.text, whole[: whole.index(stop)] + stop)


async def check_stop_token_ids(ask: Asker) -> None:
    ids = (await ask.reference(return_token_ids=True)).token_ids
    reply = await ask(stop_token_ids=[ids[2]], return_token_ids=True)
    equal("token_ids", reply.token_ids, ids[: ids.index(ids[2]) + 1])
    equal("finish_reason", reply.finish_reason, "stop")
    equal("stop_reason", reply.choices[0].stop_reason, ids[2])
    await refuses(ask, "stop_token_ids", [-1])


async def check_min_tokens(ask: Asker) -> None:
    ids = (await ask.reference(return_token_ids=True)).token_ids
    at_once = await ask.reference(stop_token_ids=ids[:1])
    equal("tokens without it", at_once.count("completion_tokens"), 1)
    reply = await ask(stop_token_ids=ids[:1], min_tokens=6, return_token_ids=True)
    hold(len(reply.token_ids) >= 6, f"{len(reply.token_ids)} tokens with min_tokens=6")
    await refuses(ask, "min_tokens", -1)


async def check_ignore_eos(ask: Asker) -> None:
    """The model's own end, forced at once, ends an answer or does not."""
    ended = await ask.reference(max_tokens=256, return_token_ids=True)
    equal("finish_reason of a long answer", ended.finish_reason, "stop")
    forced = {"logit_bias": {str(ended.token_ids[-1]): 100}, "return_token_ids": True}
    reply = await ask(**forced)
    equal("tokens and finish_reason", (len(reply.token_ids), reply.finish_reason), (1, "stop"))
    reply = await ask(**forced, ignore_eos=True)
    equal("tokens and finish_reason", (len(reply.token_ids), reply.finish_reason), (8, "length"))
    await refuses(ask, "ignore_eos", "yes")


async def check_seed(ask: Asker) -> None:
    wanted = await ask.reference(temperature=1, seed=1, max_tokens=16)
    equal("text", (await ask(temperature=1, seed=1, max_tokens=16)).text, wanted.text)
    other = await ask(temperature=1, seed=2, max_tokens=16)
    hold(other.text != wanted.text, "seeds 1 and 2 give the same text")
    await refuses(ask, "seed", -1)


def check_penalty(name: str, value: float, wrong: float) -> Check:
    async def check(ask: Asker) -> None:
        fields: dict[str, Any] = {"max_tokens": 48, "ignore_eos": True, "return_token_ids": True}
        plain = await ask.reference(**fields)
        reply = await ask(**fields, **{name: value})
        counts = len(set(reply.token_ids)), len(set(plain.token_ids))
        hold(counts[0] > counts[1], f"different tokens with and without it: {counts}")
        await refuses(ask, name, wrong)

    return check


async def check_logit_bias(ask: Asker) -> None:
    token = (await ask.reference(return_token_ids=True)).token_ids[3]
    reply = await ask(logit_bias={str(token): 100}, return_token_ids=True)
    equal("token_ids", reply.token_ids, [token] * 8)
    reply = await ask(logit_bias={str(token): -100}, return_token_ids=True)
    hold(token not in reply.token_ids, f"token {token} in spite of a bias of -100")
    for wrong in ({"word": 1}, {"1": 101}, {str(2**31): 1}):
        await refuses(ask, "logit_bias", wrong)


def _judge_tokens(reply: Reply, *, num_top: int) -> None:
    """A greedy answer's log-probabilities, with those of `num_top` others at each place."""
    tokens = reply.choices[0].tokens
    equal("text of the tokens", "".join(token.text for token in tokens), reply.text)
    for token in tokens:
        equal("number of likeliest tokens", len(token.top), num_top)
        hold(token.logprob <= 0, f"log-probability {token.logprob}")
        if num_top:
            equal("the likeliest token", token.top[0], (token.text, token.logprob))
            values = [logprob for _, logprob in token.top]
            equal("order", values, sorted(values, reverse=True))


async def check_request_id(ask: Asker) -> None:
    mine = f"check-{uuid.uuid4().hex}"
    reply = await ask(request_id=mine)
    equal("end of the id", reply.id[-len(mine) :], mine)
    equal("X-Request-Id", reply.header_id, mine)
    reply = await ask(extra_headers={"X-Request-Id": f"{mine}-header"})
    equal("X-Request-Id, sent as a header", reply.header_id, f"{mine}-header")
    first, second = (await ask()).header_id, (await ask()).header_id
    hold(bool(first) and first != second, "requests without an id have no id of their own")
    await refuses(ask, "request_id", "ä")


async def check_cache_salt(ask: Asker) -> None:
    """Pages are found again by whoever has the salt that they were made with, or none as well."""
    said = ask.prompt(f"{uuid.uuid4().hex}\n\n{_LONG_TEXT}")

    async def cached(**fields: Any) -> bool:
        return (await ask(**said, **fields, max_tokens=1)).count("cached_tokens") > 0

    if ask.mode == "stream":
        said |= {"stream_options": {"include_usage": True}}
    found = [await cached(), await cached()]
    found += [await cached(cache_salt="pepper"), await cached(cache_salt="pepper")]
    equal("cached: first, again, salted, salted again", found, [False, True, False, True])
    await refuses(ask, "cache_salt", 5)


async def check_return_token_ids(ask: Asker) -> None:
    reply = await ask(return_token_ids=True)
    equal("token ids", len(reply.token_ids), reply.count("completion_tokens"))
    reply = await ask(return_token_ids=False)
    equal("token ids", reply.choices[0].token_ids, None)
    await refuses(ask, "return_token_ids", 5)


# --------------------------------------------------------------------- checks of /completions


async def check_prompt(ask: Asker) -> None:
    """A text, token ids, and several of either."""
    ids = (await ask.reference(return_token_ids=True)).token_ids
    prompts = ["ROMEO:", "JULIET:"]
    alone = [(await ask.reference(prompt=prompt)).text for prompt in prompts]
    hold(alone[0] != alone[1], "two prompts have the same answer")
    reply = await ask(prompt=prompts)
    equal("texts", [reply.choices[place].text for place in (0, 1)], alone)
    wanted = (await ask.reference(prompt=ids)).text
    reply = await ask(prompt=[ids, ids], n=2)
    equal("texts of ids", [reply.choices[place].text for place in range(4)], [wanted] * 4)
    for wrong in ("", [], [-1], [2**40], 5, [["text"]]):
        await refuses(ask, "prompt", wrong)


async def check_echo(ask: Asker) -> None:
    plain = await ask.reference()
    equal("text", (await ask(echo=True)).text, "ROMEO:" + plain.text)
    await refuses(ask, "echo", True, logprobs=1)


async def check_best_of(ask: Asker) -> None:
    """As many as are given are drawn; more would be thrown away, and are refused."""
    reply = await ask(best_of=2, n=2)
    equal("indices", sorted(reply.choices), [0, 1])
    await refuses(ask, "best_of", 3)


async def check_logprobs(ask: Asker) -> None:
    for num_top in (0, 3):
        reply = await ask(logprobs=num_top)
        _judge_tokens(reply, num_top=num_top)
        choice, offset = reply.choices[0], 0
        for token, place in zip(choice.tokens, choice.text_offsets, strict=True):
            equal("text_offset", place, offset)
            offset += len(token.text)
    await refuses(ask, "logprobs", 21)


# ---------------------------------------------------------------- checks of /chat/completions


async def check_messages(ask: Asker) -> None:
    plain = await ask.reference()
    user = said_by("user", "Who art thou?")
    parts = said_by(
        "user", [{"type": "text", "text": "Who art "}, {"type": "text", "text": "thou?"}]
    )
    equal("text of parts", (await ask(messages=[parts])).text, plain.text)
    asked = [
        await ask(messages=[said_by(role, "A dungeon."), user]) for role in ("system", "developer")
    ]
    equal("text after system and developer", asked[0].text, asked[1].text)
    hold(asked[0].count("prompt_tokens") > plain.count("prompt_tokens"), "system is not read")
    longer = await ask(messages=[user, said_by("assistant", "A king."), user])
    hold(longer.count("prompt_tokens") > plain.count("prompt_tokens"), "history is not read")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    for wrong in (
        [],
        "Who art thou?",
        [said_by("king", "I")],
        [said_by("tool", "I")],
        [said_by("user", [picture])],
        [user | {"tool_calls": []}],
    ):
        await refuses(ask, "messages", wrong)


async def check_max_tokens_of_chat(ask: Asker) -> None:
    await check_length("max_tokens")(ask)
    await refuses(ask, "max_tokens", 4, max_completion_tokens=5)


async def check_chat_logprobs(ask: Asker) -> None:
    _judge_tokens(await ask(logprobs=True), num_top=0)
    equal("log-probabilities", (await ask(logprobs=False)).choices[0].tokens, [])
    await refuses(ask, "logprobs", 3)


async def check_top_logprobs(ask: Asker) -> None:
    _judge_tokens(await ask(logprobs=True, top_logprobs=3), num_top=3)
    await refuses(ask, "top_logprobs", 3)
    await refuses(ask, "top_logprobs", 21, logprobs=True)


async def check_add_generation_prompt(ask: Asker) -> None:
    plain = await ask.reference()
    equal("text", (await ask(add_generation_prompt=True)).text, plain.text)
    bare = await ask(add_generation_prompt=False)
    hold(bare.count("prompt_tokens") < plain.count("prompt_tokens"), "the prompt is no shorter")


async def check_continue_final_message(ask: Asker) -> None:
    messages = [said_by("user", "Who art thou?"), said_by("assistant", "I am the")]
    closed = await ask.reference(messages=messages)
    open_ = await ask(messages=messages, continue_final_message=True)
    hold(open_.count("prompt_tokens") < closed.count("prompt_tokens"), "the message is closed")
    hold(open_.text != closed.text, "the text is that of a new message")
    await refuses(ask, "continue_final_message", True, add_generation_prompt=True)
