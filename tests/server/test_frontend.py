"""Generation over real sockets: text, stops, counts, ends."""

import asyncio
from contextlib import aclosing

import pytest

from jaxserve.config import CacheConfig
from jaxserve.errors import DeadlinePassed, InternalError, NotReady, QueueFull
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.request import FinishReason, SamplingParams

TEXT = "it was the best of times, it was the wörst of times 🙂 stop it!"


async def collect(stream):
    return [chunk async for chunk in stream]


async def test_a_streamed_answer_is_the_text_in_order(serve, answer, tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    async with serve(script=answer(ids)) as served:
        chunks = await collect(served.client.generate("ROMEO:", request_id="r1"))
        assert "".join(chunk.text for chunk in chunks) == TEXT
        assert [id for chunk in chunks for id in chunk.token_ids] == ids
        assert {chunk.request_id for chunk in chunks} == {"r1"}
        assert [chunk.finish is None for chunk in chunks[:-1]] == [True] * (len(chunks) - 1)
        assert chunks[-1].finish.reason is FinishReason.LENGTH
        assert chunks[-1].usage.completion_tokens == len(ids)
        assert chunks[-1].usage.prompt_tokens == len(tokenizer.encode("ROMEO:"))
        (submit,) = served.replica.submits
        assert submit.sampling.HasField("seed") and submit.sampling.n == 1


async def test_samples_stream_side_by_side_and_usage_comes_once(serve, answer, tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    async with serve(script=answer(ids)) as served:
        sampling = SamplingParams(n=3, seed=7)
        chunks = await collect(served.client.generate([1, 2], sampling=sampling))
        for sample in range(3):
            assert "".join(c.text for c in chunks if c.sample == sample) == TEXT
        assert [chunk.usage is not None for chunk in chunks].count(True) == 1
        assert chunks[-1].usage.completion_tokens == 3 * len(ids)
        assert served.replica.submits[0].sampling.seed == 7


async def test_generate_once_gives_the_whole(serve, answer, tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    async with serve(script=answer(ids)) as served:
        done = await served.client.generate_once("ROMEO:", sampling=SamplingParams(n=2))
        assert done.text == TEXT and list(done.samples[1].token_ids) == ids
        assert done.usage.completion_tokens == 2 * len(ids)


async def test_without_tokenizer_or_on_wish_answers_are_ids_only(serve, answer):
    async with serve(script=answer([5, 6, 7]), with_tokenizer=False) as served:
        done = await served.client.generate_once([1, 2, 3])
        assert (done.text, done.samples[0].token_ids) == ("", (5, 6, 7))
        assert not (await served.client.model_info()).has_tokenizer
    async with serve(script=answer([5, 6, 7])) as served:
        done = await served.client.generate_once([1, 2, 3], detokenize=False)
        assert (done.text, done.samples[0].token_ids) == ("", (5, 6, 7))


# --------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("slice_tokens", [1, 3, 64])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_cuts_text_ids_and_usage(
    serve, answer, tokenizer, slice_tokens, include
):
    ids = tokenizer.encode(TEXT).tolist()
    sampling = SamplingParams(stop=("örst", "zebra"), include_stop=include)
    async with serve(script=answer(ids, slice_tokens=slice_tokens)) as served:
        done = await served.client.generate_once("x", sampling=sampling)
        before = TEXT[: TEXT.index("örst")]
        assert done.text == before + ("örst" if include else "")
        assert done.finish.reason is FinishReason.STOP and done.finish.stop_string == "örst"
        kept = list(done.samples[0].token_ids)
        assert ids[: len(kept)] == kept
        assert "örst" in tokenizer.decode(kept)
        assert "örst" not in tokenizer.decode(kept[:-1])
        assert done.usage.completion_tokens == len(kept)


async def test_a_match_tells_the_engine_and_a_partial_match_limits_its_row(serve, tokenizer):
    async with serve() as served:
        replica = served.replica
        sampling = SamplingParams(stop=("of the end",))
        task = asyncio.create_task(collect(served.client.generate("x", sampling=sampling)))
        submit = await replica.next_submit()
        assert not submit.sampling.stop
        replica.send(submit, tokenizer.encode("best of th").tolist())
        limit = (await replica.next_command("limit")).limit
        assert limit.request_id == submit.request_id and 1 <= limit.max_steps <= 8
        replica.send(submit, tokenizer.encode("is ").tolist())
        assert (await replica.next_command("limit")).limit.max_steps == 0
        replica.send(submit, tokenizer.encode("of the endless").tolist())
        abort = (await replica.next_command("abort")).abort
        assert (abort.sample, abort.reason) == (0, pb.FINISH_REASON_STOP)
        chunks = await task
        assert "".join(chunk.text for chunk in chunks) == "best of this "
        assert chunks[0].text == "best "
        assert abort.keep_tokens == sum(len(chunk.token_ids) for chunk in chunks)
        assert chunks[-1].usage.completion_tokens == abort.keep_tokens
        replica.send(submit, [1, 2, 3])  # the overrun comes later, and nobody wants it
        await asyncio.sleep(0.05)
        assert served.link.statistics().stale_deltas == 1


@pytest.mark.parametrize("slice_tokens", [1, 2, 64])
async def test_stop_strings_do_not_count_before_min_tokens(serve, answer, tokenizer, slice_tokens):
    ids = tokenizer.encode(TEXT).tolist()
    first = next(count for count in range(len(ids)) if "times" in tokenizer.decode(ids[:count]))
    sampling = SamplingParams(stop=("times",), min_tokens=first)
    async with serve(script=answer(ids, slice_tokens=slice_tokens)) as served:
        done = await served.client.generate_once("x", sampling=sampling)
        assert done.text == TEXT[: TEXT.rindex("times")]


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_token_is_counted_and_shown_only_on_wish(serve, answer, tokenizer, include):
    ids = [*tokenizer.encode("the best").tolist(), 0]
    script = answer(ids, finish=pb.FINISH_REASON_STOP, stop_token_id=0)
    async with serve(script=script) as served:
        sampling = SamplingParams(include_stop=include)
        done = await served.client.generate_once("x", sampling=sampling)
        assert done.text == "the best" + ("<eos>" if include else "")
        assert done.finish.stop_token_id == 0 and done.usage.completion_tokens == len(ids)


async def test_text_held_back_for_a_stop_string_comes_at_the_end(serve, answer, tokenizer):
    ids = tokenizer.encode("the best of").tolist()
    async with serve(script=answer(ids)) as served:
        sampling = SamplingParams(stop=("of times",))
        chunks = await collect(served.client.generate("x", sampling=sampling))
        assert "".join(chunk.text for chunk in chunks) == "the best of"
        assert chunks[-1].finish.reason is FinishReason.LENGTH


# ------------------------------------------------------------------------- log-probabilities


async def test_logprobs_carry_texts_and_end_with_the_tokens(serve, tokenizer):
    ids = tokenizer.encode("best of times").tolist()

    async def script(submit, replica):
        logprobs = [
            pb.TokenLogprob(
                token_id=id, logprob=-0.5, top=[pb.TopLogprob(token_id=0, logprob=-2.0)]
            )
            for id in ids
        ]
        prompt = [pb.PromptLogprob(), pb.PromptLogprob(value=logprobs[0])]
        replica.send(submit, ids, logprobs=logprobs, prompt_logprobs=prompt, cached_tokens=8)

    async with serve(script=script) as served:
        sampling = SamplingParams(stop=("of",), logprobs=1, prompt_logprobs=0)
        call = served.channel.unary_unary(
            "/jaxserve.v1.Jaxserve/GenerateOnce",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateOnceResponse.FromString,
        )
        done = await served.client.generate_once("x", sampling=sampling)
        assert len(done.samples[0].logprobs) == len(done.samples[0].token_ids) < len(ids)
        assert done.samples[0].logprobs[0].top == ((0, -2.0),)
        assert done.prompt_logprobs[0] is None and done.prompt_logprobs[1].token == ids[0]
        assert done.usage.cached_tokens == 8
        raw = await call(
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(stop=["of"], logprobs=1))
        )
        assert raw.samples[0].logprobs[0].text == tokenizer.token_text(ids[0])
        assert raw.samples[0].logprobs[0].top[0].text == "<eos>"
        assert not served.replica.submits[0].page_keys  # prompt log-probabilities bypass the cache


# ---------------------------------------------------------------------------------- ends


async def test_leaving_a_stream_aborts_the_request_at_once(serve):
    async with serve() as served:
        async with aclosing(served.client.generate("x", request_id="gone")) as stream:
            task = asyncio.create_task(anext(stream))
            submit = await served.replica.next_submit()
            served.replica.send(submit, [1, 2])
            await task
        abort = (await served.replica.next_command("abort")).abort
        assert (abort.request_id, abort.sample) == ("gone", -1)
        assert abort.reason == pb.FINISH_REASON_ABORT
        assert await served.frontend.wait_idle(2)
        assert served.log_lines()[-1]["code"] == "CANCELLED"


async def test_cancelling_generate_once_aborts_too(serve):
    async with serve() as served:
        task = asyncio.create_task(served.client.generate_once("x"))
        await served.replica.next_submit()
        task.cancel()
        abort = (await served.replica.next_command("abort")).abort
        assert abort.reason == pb.FINISH_REASON_ABORT


async def test_a_deadline_reaches_the_engine_and_ends_the_stream(serve):
    async with serve() as served:
        with pytest.raises(DeadlinePassed):
            await collect(served.client.generate("x", timeout_s=0.2))
        assert 0 < served.replica.submits[0].timeout_s <= 0.2
        abort = (await served.replica.next_command("abort")).abort
        assert abort.reason == pb.FINISH_REASON_DEADLINE
        assert served.log_lines()[-1]["code"] == "DEADLINE_EXCEEDED"


async def test_what_came_before_a_queue_time_out_is_delivered_first(serve, answer):
    script = answer([3, 4], finish=pb.FINISH_REASON_DEADLINE, message="waited 600 s in the queue")
    async with serve(script=script) as served:
        chunks = []
        with pytest.raises(DeadlinePassed, match="waited 600 s"):
            async for chunk in served.client.generate("x"):
                chunks.append(chunk)
        assert chunks[-1].finish.reason is FinishReason.DEADLINE
        assert chunks[-1].token_ids == (3, 4)


async def test_an_engine_fault_is_internal_with_an_id(serve, answer):
    script = answer([3], finish=pb.FINISH_REASON_ERROR, message="the device is gone")
    async with serve(script=script) as served:
        with pytest.raises(InternalError, match="device is gone"):
            await served.client.generate_once("x")


async def test_a_full_queue_says_when_to_try_again(serve):
    async def script(submit, replica):
        rejected = pb.Rejected(
            request_id=submit.request_id,
            attempt=submit.attempt,
            code="RESOURCE_EXHAUSTED",
            message="the queue is full; try again in 2.5 s",
            retry_after_s=2.5,
        )
        replica.report(rejected=[rejected])

    async with serve(script=script) as served:
        with pytest.raises(QueueFull, match="the queue is full; try again in 2.5 s$") as caught:
            await collect(served.client.generate("x"))
        assert caught.value.retry_after_s == 2.5
        call = served.channel.unary_unary(
            "/jaxserve.v1.Jaxserve/GenerateOnce",
            request_serializer=pb.GenerateRequest.SerializeToString,
        )(pb.GenerateRequest(text="x"))
        assert dict(await call.trailing_metadata())["retry-delay-ms"] == "2500"


async def test_abort_by_id_ends_the_stream_with_what_there_is(serve, tokenizer):
    async with serve() as served:
        stream = served.client.generate("x", request_id="r1")
        task = asyncio.create_task(anext(stream))
        submit = await served.replica.next_submit()
        served.replica.send(submit, tokenizer.encode("best").tolist())
        assert (await task).text == "best"
        outcome = await served.client.abort("r1", "r2")
        assert (outcome.aborted, outcome.unknown) == (("r1",), ("r2",))
        (last,) = await collect(stream)
        assert last.finish.reason is FinishReason.ABORT and last.usage.completion_tokens > 0
        assert (await served.replica.next_command("abort")).abort.sample == -1


async def test_deltas_join_while_the_reader_is_slow(serve):
    async with serve() as served:
        stream = served.client.generate([1], detokenize=False)
        task = asyncio.create_task(anext(stream))
        submit = await served.replica.next_submit()
        deltas = [served.replica.delta(submit, [count]) for count in range(300)]
        served.replica.report(*deltas)
        served.replica.send(submit, [300], finish=pb.FINISH_REASON_LENGTH)
        chunks = [await task, *await collect(stream)]
        assert len(chunks) <= 2
        assert [id for chunk in chunks for id in chunk.token_ids] == list(range(301))


# ------------------------------------------------------------------------------- identity


async def test_clients_are_told_apart_and_keys_follow_scope_and_salt(serve, answer):
    cache = CacheConfig(prefix_scope="client")
    async with serve(script=answer([1]), cache=cache) as served:
        prompt = list(range(1, 20))
        for fields in ({}, {"client": "alice"}, {"client": "alice"}, {"cache_salt": "s"}):
            await served.client.generate_once(prompt, **fields)
        nobody, alice, again, salted = served.replica.submits
        assert (nobody.client, alice.client) == ("anonymous", "alice")
        assert len(nobody.page_keys) == 2  # 19 tokens are two whole pages of 8
        assert alice.page_keys == again.page_keys
        keys = [tuple(submit.page_keys) for submit in (nobody, alice, salted)]
        assert len(set(keys)) == 3


async def test_metadata_names_the_client_before_the_message_does(serve, answer):
    async with serve(script=answer([1])) as served:
        call = served.channel.unary_unary(
            "/jaxserve.v1.Jaxserve/GenerateOnce",
            request_serializer=pb.GenerateRequest.SerializeToString,
        )
        request = pb.GenerateRequest(text="x", client="bob")
        await call(request, metadata=(("x-jaxserve-client", "carol"),))
        assert served.replica.submits[0].client == "carol"


async def test_the_log_has_ids_and_counts_but_no_text(serve, answer, tokenizer):
    ids = tokenizer.encode("of times").tolist()
    async with serve(script=answer(ids)) as served:
        await served.client.generate_once("a secret prompt", request_id="r9", client="alice")
        (line,) = served.log_lines()
        assert (line["request_id"], line["client"], line["code"]) == ("r9", "alice", "OK")
        assert line["completion_tokens"] == len(ids) and line["finish"] == ["length"]
        assert 0 < line["first_token_s"] <= line["total_s"]
        logged = served.log_path.read_text()
        assert "secret" not in logged and "times" not in logged


# ------------------------------------------------------------------------------- draining


async def test_a_drain_lets_live_requests_finish_and_refuses_new_ones(serve):
    async with serve() as served:
        task = asyncio.create_task(served.client.generate_once([1], detokenize=False))
        submit = await served.replica.next_submit()
        served.frontend.begin_drain()
        assert (await served.client.server_info()).state == "draining"
        with pytest.raises(NotReady, match="draining"):
            await served.client.generate_once("x")
        assert not await served.frontend.wait_idle(0.05)
        served.replica.send(submit, [4], finish=pb.FINISH_REASON_LENGTH)
        assert (await task).samples[0].token_ids == (4,)
        assert await served.frontend.wait_idle(1)
        assert served.frontend.statistics().requests == 2


async def test_the_rest_ends_unavailable_after_the_drain(serve):
    async with serve() as served:
        tasks = [asyncio.create_task(collect(served.client.generate("x"))) for _ in range(3)]
        for _ in tasks:
            await served.replica.next_submit()
        served.frontend.begin_drain()
        await served.frontend.end_rest()
        for task in tasks:
            with pytest.raises(NotReady, match="shutting down"):
                await task
        assert served.frontend.statistics().live == 0
        assert (await served.replica.next_command("abort")).abort.reason == pb.FINISH_REASON_ABORT


async def test_a_faulty_delta_ends_its_own_request_alone(serve, answer, caplog):
    async with serve() as served:
        bad = asyncio.create_task(served.client.generate_once("x"))
        first = await served.replica.next_submit()
        good = asyncio.create_task(served.client.generate_once([1], detokenize=False))
        second = await served.replica.next_submit()
        served.replica.report(
            served.replica.delta(first, [1], sample=9),  # there is no sample 9
            served.replica.delta(second, [2], finish=pb.FINISH_REASON_LENGTH),
        )
        assert (await good).samples[0].token_ids == (2,)
        with pytest.raises(InternalError, match="error id") as caught:
            await bad
        assert caught.value.error_id in caplog.text and "IndexError" in caplog.text
