"""The HTTP dialect over real sockets: OpenAI's shapes, streams, refusals, clients that leave."""

import asyncio
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.config import CacheConfig
from jaxserve.errors import NotReady
from jaxserve.proto import jaxserve_v1_pb2 as pb

TEXT = "it was the best of times, it was the wörst of times 🙂 stop it!"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a conversation begins with its user') }}{% endif %}"
    "[{{ m.name or m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if shout %}!{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def serve_http(serve):
    def serving(**options):
        return serve(http=True, template=TEMPLATE, **options)

    return serving


def prompt_text(tokenizer, submit) -> str:
    ids = [
        int.from_bytes(submit.prompt[i : i + 4], "little") for i in range(0, len(submit.prompt), 4)
    ]
    return tokenizer.decode(ids, skip_special_tokens=False)


# ----------------------------------------------------------------------------------- answers


async def test_a_completion_is_the_text_whole(serve_http, answer, tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    async with serve_http(script=answer(ids, cached_tokens=3)) as served:
        reply = await served.post(COMPLETIONS, {"model": "tiny", "prompt": "ROMEO:", "n": 2})
        assert reply.status == 200
        body = reply.json
        assert (body["object"], body["model"]) == ("text_completion", "tiny")
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert {choice["text"] for choice in body["choices"]} == {TEXT}
        assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
        num_prompt = len(tokenizer.encode("ROMEO:"))
        assert body["usage"] == {
            "prompt_tokens": num_prompt,
            "completion_tokens": 2 * len(ids),
            "total_tokens": num_prompt + 2 * len(ids),
            "prompt_tokens_details": {"cached_tokens": 3},
        }


async def test_a_stream_has_one_event_per_sample_and_slice(serve_http, answer, tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    body = {
        "messages": HELLO,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with serve_http() as served, served.connected() as connection:
        await connection.send("POST", CHAT, json.dumps(body).encode())
        submit = await served.replica.next_submit()
        texts, finishes = ["", ""], [None, None]
        starts = range(0, len(ids), 5)
        for start in starts:
            finish = pb.FINISH_REASON_LENGTH if start == starts[-1] else 0
            part = ids[start : start + 5]
            deltas = (
                served.replica.delta(submit, part, sample=sample, finish=finish)
                for sample in range(2)
            )
            served.replica.report(*deltas)
            if start == 0:
                status, headers = await connection.head()
                assert (status, headers["content-type"]) == (200, "text/event-stream")
            events = (await connection.chunk()).decode().split("\n\n")[:-1]
            assert len(events) == 2  # both samples' tokens of the slice, and no more
            for event in events:
                chunk = json.loads(event.removeprefix("data: "))
                assert chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None
                (choice,) = chunk["choices"]
                assert ("role" in choice["delta"]) == (start == 0)
                texts[choice["index"]] += choice["delta"]["content"]
                finishes[choice["index"]] = choice["finish_reason"]
        assert (texts, finishes) == ([TEXT, TEXT], ["length", "length"])
        usage, done = (await connection.chunk()).decode().split("\n\n")[:-1]
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 2 * len(
            ids
        )
        assert done == "data: [DONE]"
        assert await connection.chunk() == b""


async def test_chat_goes_through_the_template(serve_http, answer, tokenizer):
    parts = [{"type": "text", "text": "to "}, {"type": "text", "text": "be"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "Ann"},
        # What an SDK gives back of an earlier answer has these nulls.
        {"role": "assistant", "content": "or", "refusal": None, "tool_calls": None},
    ]
    async with serve_http(script=answer([5])) as served:
        prompts = []
        for more in (
            {},
            {"continue_final_message": True},
            {"add_generation_prompt": False, "chat_template_kwargs": {"shout": True}},
        ):
            reply = await served.post(CHAT, {"messages": messages, **more})
            assert reply.status == 200, reply.body
            prompts.append(prompt_text(tokenizer, await served.replica.next_submit()))
        begin = "[system]be brief\n[Ann]to be\n[assistant]or"
        assert prompts == [begin + "\n[assistant]", begin, begin + "\n!"]
        message = reply.json["choices"][0]["message"]
        assert message["role"] == "assistant" and message["content"] == tokenizer.decode([5])


async def test_several_prompts_are_several_choices(serve_http, answer, tokenizer):
    ids = tokenizer.encode("best").tolist()
    body = {"prompt": ["a", [3, 4]], "n": 2, "echo": True, "request_id": "many"}
    async with serve_http(script=answer(ids)) as served:
        whole = (await served.post(COMPLETIONS, body)).json["choices"]
        second = tokenizer.decode([3, 4])
        wanted = ["abest", "abest", second + "best", second + "best"]
        assert [choice["text"] for choice in whole] == wanted
        assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
        assert {s.request_id for s in served.replica.submits} == {"many-0", "many-1"}
        reply = await served.post(COMPLETIONS, body | {"stream": True})
        texts = [""] * 4
        for event in reply.events[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == wanted and reply.events[-1] == "[DONE]"
        assert reply.headers["x-request-id"] == "many"


async def test_logprobs_in_both_shapes(serve_http, tokenizer):
    ids = tokenizer.encode("wör").tolist()

    async def script(submit, replica):
        logprobs = [
            pb.TokenLogprob(
                token_id=id,
                logprob=-0.5,
                top=[
                    pb.TopLogprob(token_id=id, logprob=-0.5),
                    pb.TopLogprob(token_id=0, logprob=float("-inf")),
                ],
            )
            for id in ids
        ]
        replica.send(submit, ids, logprobs=logprobs, finish=pb.FINISH_REASON_LENGTH)

    async with serve_http(script=script) as served:
        body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
        (choice,) = (await served.post(CHAT, body)).json["choices"]
        content = choice["logprobs"]["content"]
        assert b"".join(bytes(token["bytes"]) for token in content) == "wör".encode()
        assert content[0]["top_logprobs"][1] == {
            "token": "<eos>",
            "logprob": -9999.0,
            "bytes": None,
        }
        assert served.replica.submits[0].sampling.logprobs == 2
        body = {"prompt": "x", "logprobs": 1}
        logprobs = (await served.post(COMPLETIONS, body)).json["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"] == [-0.5] * len(ids)
        lengths = [len(token) for token in logprobs["tokens"]]
        assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(ids))]


async def test_every_sampling_parameter_reaches_the_engine(serve_http, answer):
    body = {
        "prompt": "x",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop_token_ids": [5],
        "seed": 11,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "logit_bias": {"3": 2.5},
        "top_k": 40,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
    }
    async with serve_http(script=answer([1, 2])) as served:
        reply = await served.post(
            COMPLETIONS, body | {"priority": -3, "request_id": "r", "user": "ann"}
        )
        assert reply.status == 200, reply.body
        (submit,) = served.replica.submits
        body["include_stop"] = body.pop("include_stop_str_in_output")
        body["logit_bias"] = {3: 2.5}
        del body["prompt"]
        for name, value in body.items():
            got = getattr(submit.sampling, name)
            got = (
                dict(got)
                if name == "logit_bias"
                else list(got)
                if name == "stop_token_ids"
                else got
            )
            assert got == value, name
        assert (submit.priority, submit.request_id, submit.client) == (-3, "r", "ann")
        assert reply.headers["x-request-id"] == "r"


async def test_absent_parameters_take_the_models_defaults(serve_http, answer):
    defaults = {"temperature": 0.5, "top_k": 20, "max_tokens": 10_000}
    async with serve_http(script=answer([1]), sampling_defaults=defaults) as served:
        await served.post(COMPLETIONS, {"prompt": "x", "top_k": -1})
        await served.client.generate_once([1, 2], sampling={"temperature": 0.0})
        first, second = (submit.sampling for submit in served.replica.submits)
        assert (first.temperature, first.top_k, second.temperature, second.top_k) == (0.5, 0, 0, 20)
        assert second.max_tokens == 512 - 2
        info = await served.client.model_info()
        assert info.sampling_defaults == defaults and info.has_chat_template


async def test_a_stop_says_what_matched(serve_http, answer, tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    async with serve_http(script=answer(ids)) as served:
        (choice,) = (await served.post(CHAT, {"messages": HELLO, "stop": ["times"]})).json[
            "choices"
        ]
        assert choice["message"]["content"] == "it was the best of "
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "times")
    script = answer([4, 5], finish=pb.FINISH_REASON_STOP, stop_token_id=5)
    async with serve_http(script=script) as served:
        body = {"prompt": "x", "stop_token_ids": [5], "return_token_ids": True}
        (choice,) = (await served.post(COMPLETIONS, body)).json["choices"]
        assert (choice["stop_reason"], choice["token_ids"]) == (5, [4, 5])


async def test_without_a_tokenizer_ids_go_both_ways(serve_http, answer):
    async with serve_http(script=answer([5, 6]), with_tokenizer=False) as served:
        (choice,) = (await served.post(COMPLETIONS, {"prompt": [1, 2]})).json["choices"]
        assert (choice["text"], choice["token_ids"]) == ("", [5, 6])
        reply = await served.post(COMPLETIONS, {"prompt": "text"})
        assert (reply.status, reply.json["error"]["param"]) == (400, "prompt")
        assert (await served.post(CHAT, {"messages": HELLO})).status == 400


async def test_models_health_version_and_metrics(serve_http, answer):
    async with serve_http(script=answer([1, 2, 3])) as served:
        (model,) = (await served.get("/v1/models")).json["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 512)
        assert (await served.get("/v1/models/tiny")).json == model
        missing = await served.get("/v1/models/gpt/4")
        assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
        assert (await served.get("/health")).json == {"status": "ok"}
        assert "version" in (await served.get("/version")).json
        await served.post(COMPLETIONS, {"prompt": "x"})
        page = await served.get("/metrics")
        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families(page.body.decode())
            for sample in family.samples
        }
        assert values["jaxserve_generation_tokens_total"] == 3
        assert values["jaxserve_num_requests_running"] == 3  # the scripted replica says so
        served.frontend.begin_drain()
        draining = await served.get("/health")
        assert (draining.status, draining.json["error"]["code"]) == (503, "not_ready")


# ----------------------------------------------------------------------------------- refusals

BAD = [
    (CHAT, b"", "body"),
    (CHAT, b"{", "body"),
    (CHAT, b"[1]", "body"),
    (CHAT, b"\xff\xfe", "body"),
    (CHAT, b"[" * 100_000, "body"),
    (CHAT, b'{"messages": "\\ud800"}', "body"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
        "messages[0].tool_calls",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
    ),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
    (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages",
    ),
    (
        CHAT,
        {"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    (COMPLETIONS, {"prompt": "x", "surprise": 1}, "surprise"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "x", "n": 1000, "echo": True}, "n"),
    (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
    (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop[0]"),
    (COMPLETIONS, {"prompt": "x", "stop": [1]}, "stop[0]"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"999": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {}}, "stream_options"),
    (COMPLETIONS, {"prompt": "x", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (
        COMPLETIONS,
        {"prompt": "x", "stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    (COMPLETIONS, {"prompt": "x", "priority": 10**7}, "priority"),
    (COMPLETIONS, {"prompt": "x", "request_id": "é"}, "request_id"),
    (COMPLETIONS, {"prompt": "x", "request_id": "r" * 129}, "request_id"),
    (COMPLETIONS, {"prompt": "x", "user": "u" * 129}, "user"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "x"]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [2**70]}, "prompt"),
    (COMPLETIONS, {"prompt": [399, 400]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": ["x"] * 129}, "prompt"),
]


async def test_bad_bodies_are_refused_by_name_and_the_server_goes_on(serve_http, answer):
    async with serve_http(script=answer([1])) as served:
        for path, body, param in BAD:
            reply = await served.post(path, body)
            error = reply.json["error"]
            assert (reply.status, error["param"]) == (400, param), (body, reply.body)
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith(param.partition("[")[0])
        assert not served.replica.submits
        lines = served.log_lines()
        assert len(lines) == len(BAD) and {line["code"] for line in lines} == {"INVALID_ARGUMENT"}
        assert served.desk.metrics.request_errors["INVALID_ARGUMENT"] == len(BAD)
        assert (await served.post(COMPLETIONS, {"prompt": "x"})).status == 200
        assert (
            "a conversation begins"
            in (
                await served.post(CHAT, {"messages": [{"role": "assistant", "content": "x"}]})
            ).json["error"]["message"]
        )


async def test_values_that_ask_for_nothing_pass(serve_http, answer):
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "store": False,
        "service_tier": "auto",
        "audio": None,
        "stop": None,
        "logprobs": False,
        "prompt_cache_key": "conversation-7",
    }
    async with serve_http(script=answer([1])) as served:
        assert (await served.post(CHAT, {"messages": HELLO, **neutral})).status == 200


async def test_what_is_not_there_and_what_is_too_long(serve_http, answer):
    async with serve_http(script=answer([1])) as served:
        for method, path, status in (("GET", "/v2", 404), ("GET", CHAT, 405)):
            async with served.connected() as connection:
                await connection.send(method, path)
                reply = await connection.reply()
                assert reply.status == status and reply.json["error"]["message"]
        unknown = await served.post(COMPLETIONS, {"prompt": "x", "model": "gpt-4"})
        assert (unknown.status, unknown.json["error"]["param"]) == (404, "model")
        long = await served.post(COMPLETIONS, {"prompt": "x" * 300_000})
        assert (long.status, long.json["error"]["param"]) == (413, "body")
        assert (await served.post(COMPLETIONS, {"prompt": "x"})).status == 200


async def test_a_refusal_by_the_engine_has_its_own_status_in_a_stream_too(serve_http):
    async def script(submit, replica):
        full = pb.Rejected(
            request_id=submit.request_id,
            attempt=submit.attempt,
            code="RESOURCE_EXHAUSTED",
            message="queue full",
            retry_after_s=2.5,
        )
        replica.report(rejected=[full])

    async with serve_http(script=script) as served:
        for stream in (False, True):
            reply = await served.post(COMPLETIONS, {"prompt": "x", "stream": stream})
            assert (reply.status, reply.headers["retry-after"]) == (429, "3")
            assert reply.json["error"]["code"] == "queue_full"


@pytest.mark.parametrize("ids", [[], [5]])
async def test_a_passed_time_out_has_its_own_status_until_tokens_came(serve_http, ids):
    async def script(submit, replica):
        if ids:
            replica.send(submit, ids)
        end = {"finish": pb.FINISH_REASON_DEADLINE, "message": "queue time-out passed"}
        replica.send(submit, **end)

    async with serve_http(script=script) as served:
        whole = await served.post(COMPLETIONS, {"prompt": "x"})
        assert (whole.status, whole.json["error"]["code"]) == (504, "deadline_passed")
        reply = await served.post(COMPLETIONS, {"prompt": "x", "stream": True})
        assert reply.status == (200 if ids else 504)
        last = reply.events[-1] if ids else reply.json
        assert last["error"]["message"] == "queue time-out passed"
        assert served.log_lines()[-1]["code"] == "DEADLINE_EXCEEDED"


async def test_an_error_in_a_stream_is_its_last_event(serve_http):
    async with serve_http() as served, served.connected() as connection:
        await connection.send("POST", COMPLETIONS, b'{"prompt": "x", "stream": true}')
        submit = await served.replica.next_submit()
        served.replica.send(submit, [5])
        status, _ = await connection.head()
        assert status == 200 and await connection.chunk()
        served.desk.end_rest(NotReady("going down"))
        last = (await connection.chunk()).decode()
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "going down"
        assert await connection.chunk() == b""
        assert served.log_lines()[-1]["code"] == "UNAVAILABLE"


# ------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_is_cancelled(serve_http, stream, begun):
    async with serve_http() as served:
        async with served.connected() as connection:
            body = json.dumps({"prompt": "x", "stream": stream}).encode()
            await connection.send("POST", COMPLETIONS, body)
            submit = await served.replica.next_submit()
            if begun:
                served.replica.send(submit, [5])
            if begun and stream:
                await connection.head()
        abort = (await served.replica.next_command("abort")).abort
        assert (abort.request_id, abort.sample) == (submit.request_id, -1)
        assert await served.frontend.wait_idle(2)
        assert served.log_lines()[-1]["code"] == "CANCELLED"


async def test_a_client_that_leaves_while_it_speaks_harms_nobody(serve_http, answer):
    async with serve_http(script=answer([1])) as served:
        async with served.connected() as connection:
            connection.writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99\r\n\r\n{")
            await connection.writer.drain()
        async with served.connected() as connection:
            connection.writer.write(b"this is no HTTP\r\n\r\n")
            await connection.reader.read()
        await asyncio.sleep(0.05)
        assert (await served.post(COMPLETIONS, {"prompt": "x"})).status == 200


async def test_both_dialects_share_request_ids(serve_http):
    async with serve_http() as served:
        task = asyncio.create_task(served.client.generate_once([1], request_id="same"))
        submit = await served.replica.next_submit()
        reply = await served.post(COMPLETIONS, {"prompt": "x"}, x_request_id="same")
        assert (reply.status, reply.json["error"]["param"]) == (400, "request_id")
        assert (await served.client.abort("same")).aborted == ("same",)
        await task
        assert submit.request_id == "same"


# ----------------------------------------------------------------------------------- caching


async def test_a_salt_parts_prompts_that_are_equal(serve_http, answer):
    body = {"prompt": [7] * 32}
    async with serve_http(script=answer([1]), cache=CacheConfig(page_size=8)) as served:
        await served.post(COMPLETIONS, body)
        await served.post(COMPLETIONS, body | {"cache_salt": "mine"})
        first, second = served.replica.submits
        assert len(first.page_keys) == 4 and set(first.page_keys).isdisjoint(second.page_keys)
