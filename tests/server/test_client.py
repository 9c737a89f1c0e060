"""The blocking client; the asyncio one is what the other tests speak through."""

import asyncio

import pytest

from jaxserve.client import Client
from jaxserve.errors import BadRequest, NotReady
from jaxserve.request import FinishReason, SamplingParams

TEXT = "it was the best of times"


def ask_everything(target: str, ids: list[int]) -> None:
    with Client(target, client="alice") as client:
        chunks = list(client.generate("ROMEO:", sampling=SamplingParams(n=2)))
        assert "".join(chunk.text for chunk in chunks if chunk.sample == 0) == TEXT
        assert chunks[-1].finish.reason is FinishReason.LENGTH
        assert chunks[-1].usage.completion_tokens == 2 * len(ids)
        done = client.generate_once([1, 2], detokenize=False)
        assert (done.text, list(done.samples[0].token_ids)) == ("", ids)
        assert done.finish.reason is FinishReason.LENGTH
        assert client.tokenize(TEXT) == ids and client.detokenize(ids) == TEXT
        assert client.models() == ["tiny"] and client.model_info().vocab_size == 400
        assert client.server_info().state == "serving" and client.is_serving()
        assert client.statistics()[0].values["running"] == 3.0
        assert client.abort("nobody").unknown == ("nobody",)
        with pytest.raises(BadRequest, match="n: got 9; allowed: 1 to 4"):
            client.generate_once("x", sampling=SamplingParams(n=9))
        with pytest.raises(BadRequest, match="text: got ''"):
            next(client.generate(""))


async def test_the_blocking_client_does_everything(serve, answer, tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    async with serve(script=answer(ids)) as served:
        await asyncio.to_thread(ask_everything, served.target, ids)
        assert {submit.client for submit in served.replica.submits} == {"alice"}


async def test_leaving_a_blocking_stream_cancels_it(serve):
    async def script(submit, replica):
        replica.send(submit, [1])

    def take_one(target):
        with Client(target) as client:
            for _ in client.generate([1], detokenize=False):
                break

    async with serve(script=script) as served:
        await asyncio.to_thread(take_one, served.target)
        assert (await served.replica.next_command("abort")).abort.sample == -1


async def test_no_server_is_not_ready():
    def ask():
        with Client("127.0.0.1:1") as client:
            client.models()

    with pytest.raises(NotReady):
        await asyncio.to_thread(ask)
