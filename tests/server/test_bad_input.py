"""Everything the issue lists as bad input, as a client sees it. The server goes on after each."""

import asyncio
import math

import grpc
import pytest

from jaxserve.config import CacheConfig
from jaxserve.errors import BadRequest, NotBuilt, UnknownModel
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.request import SamplingParams

Sampling = pb.SamplingParams


def lengths(number: int, payload: bytes) -> bytes:
    """One field with a length, as protobuf writes it."""
    assert number < 16 and len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


IDS = pb.TokenIds(ids=[1, 2])
BAD = {
    # field named, what was got, what is allowed
    "no prompt": (pb.GenerateRequest(), "prompt: got 'nothing'; allowed: text or token_ids"),
    "empty text": (pb.GenerateRequest(text=""), "text: got ''; allowed: at least one character"),
    "no ids": (pb.GenerateRequest(token_ids=pb.TokenIds()), r"prompt: got \[\]; .* one token"),
    "too long": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 600)),
        "prompt: got '600 tokens'; allowed: at most 511 tokens",
    ),
    "id out of range": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 400])),
        r"prompt token_ids\[1\]: got 400; allowed: 0 to 399",
    ),
    "id beyond int32": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])),
        r"token_ids\[0\]: got 4294967295; allowed",
    ),
    "negative temperature": (Sampling(temperature=-1), r"temperature: got -1.0; .* \[0, 100\]"),
    "NaN temperature": (Sampling(temperature=math.nan), "temperature: got nan; allowed: a number"),
    "top_p 0": (Sampling(top_p=0), r"top_p: got 0.0; .* \(0, 1\]"),
    "top_p above 1": (Sampling(top_p=1.5), "top_p: got 1.5"),
    "max_tokens 0": (Sampling(max_tokens=0), "max_tokens: got 0; allowed: 1 to 510"),
    "beyond context": (Sampling(max_tokens=511), "max_tokens: got 511; allowed: 1 to 510"),
    "many stops": (Sampling(stop=["x"] * 17), "stop: got '17 strings'; allowed: at most 16"),
    "empty stop": (Sampling(stop=["x", ""]), r"stop\[1\]: got ''; allowed: 1 to 256 characters"),
    "n too large": (Sampling(n=5), "n: got 5; allowed: 1 to 4"),
    "seed": (Sampling(seed=2**63), "seed: got 9223372036854775808; allowed: 0 to"),
    "stops without text": (
        pb.GenerateRequest(token_ids=IDS, detokenize=False, sampling=Sampling(stop=["x"])),
        r"stop: got \['x'\]; allowed: none where the answer is token ids only",
    ),
    "both prompts": (
        lengths(2, b"hello") + lengths(3, b"\x0a\x01\x07"),
        "prompt: got 'both text and token_ids'; allowed: one of text or token_ids",
    ),
    "not UTF-8": (lengths(2, b"ab\xff"), r"text: got b'ab\\xff'; allowed: UTF-8 \(byte 2"),
    "a stop that is not UTF-8": (
        lengths(2, b"x") + lengths(4, lengths(13, b"\xc3")),
        r"sampling\.stop: got .* UTF-8",
    ),
    "a stop of another type": (
        lengths(2, b"x") + lengths(4, bytes([13 << 3, 7])),
        "sampling.stop: got 'a varint'; allowed: bytes with a length on the wire",
    ),
    "unknown parameter": (
        lengths(2, b"x") + lengths(4, b"\xa0\x06\x01"),
        "sampling.field 100: got 'a varint'; allowed: the fields max_tokens, min_tokens",
    ),
    "damaged": (b"\x12\x7fx", "message: got '3 damaged bytes'; allowed: a serialised jaxserve"),
    "over the size limit": (
        pb.GenerateRequest(text="x" * 300_000),
        "message: got '3000.. bytes'; allowed: at most 262144 bytes",
    ),
    "client": (pb.GenerateRequest(text="x", client="c" * 129), "client: got .* at most 128"),
    "request id": (pb.GenerateRequest(text="x", request_id="i" * 129), "request_id: got"),
}


def data_of(bad: object) -> bytes:
    if isinstance(bad, Sampling):
        bad = pb.GenerateRequest(token_ids=IDS, sampling=bad)
    return bad if isinstance(bad, bytes) else bad.SerializeToString()


async def test_bad_input_is_refused_by_name_and_the_server_goes_on(serve, answer):
    async with serve(script=answer([5])) as served:
        stream = served.channel.unary_stream("/jaxserve.v1.Jaxserve/Generate")
        once = served.channel.unary_unary("/jaxserve.v1.Jaxserve/GenerateOnce")
        for case, (bad, words) in BAD.items():
            with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
                await once(data_of(bad))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, case
            field = dict(caught.value.trailing_metadata())["error-field"]
            assert caught.value.details().startswith(field)
            with pytest.raises(grpc.aio.AioRpcError, match=words):
                await anext(aiter(stream(data_of(bad))))
        assert not served.replica.submits
        assert (await served.client.generate_once("x")).usage.completion_tokens == 1
        assert {line["code"] for line in served.log_lines()[:-1]} == {"INVALID_ARGUMENT"}


async def test_a_message_beyond_the_hard_limit_is_a_clean_error_too(serve, answer):
    async with serve(script=answer([5])) as served:
        with pytest.raises(BadRequest, match="(?i)larger than max"):
            await served.client.generate_once("x" * 2_000_000)
        assert (await served.client.generate_once("x")).usage.completion_tokens == 1


async def test_the_client_raises_our_errors(serve, answer):
    async with serve(script=answer([5])) as served:
        with pytest.raises(BadRequest, match="temperature: got -1.0; allowed") as caught:
            await served.client.generate_once("x", sampling=SamplingParams(temperature=-1.0))
        assert caught.value.field == "temperature"
        for sampling in (
            SamplingParams(max_tokens=-1),
            SamplingParams(stop_token_ids=(-7,)),
        ):
            with pytest.raises(BadRequest, match="(max_tokens|stop_token_ids): got"):
                await served.client.generate_once("x", sampling=sampling)
        for prompt in ("\ud800", [-1]):
            with pytest.raises(BadRequest, match="prompt: got"):
                await served.client.generate_once(prompt)
        with pytest.raises(UnknownModel, match="got 'gpt'; this server has 'tiny'"):
            await served.client.generate_once("x", model="gpt")


async def test_a_live_request_id_is_not_given_twice(serve):
    async with serve() as served:
        stream = served.client.generate([1], request_id="same")
        task = asyncio.create_task(anext(stream))
        submit = await served.replica.next_submit()
        with pytest.raises(BadRequest, match="request_id: got 'same'; allowed: an id that no"):
            await served.client.generate_once([1], request_id="same")
        served.replica.send(submit, [2], finish=pb.FINISH_REASON_LENGTH)
        await task


async def test_text_needs_a_tokenizer(serve, answer):
    async with serve(script=answer([5]), with_tokenizer=False) as served:
        with pytest.raises(BadRequest, match="text: got 'hi'; allowed: token ids only: the model"):
            await served.client.generate_once("hi")
        with pytest.raises(BadRequest, match="detokenize: got True; allowed: token ids only"):
            await served.client.generate_once([1], detokenize=True)
        with pytest.raises(BadRequest, match="stop: got"):
            await served.client.generate_once([1], sampling=SamplingParams(stop=("x",)))
        with pytest.raises(BadRequest, match="text: got 'hi'"):
            await served.client.tokenize("hi")
        with pytest.raises(BadRequest, match="token_ids: got"):
            await served.client.detokenize([1])


async def test_a_group_scope_needs_a_group(serve, answer):
    async with serve(script=answer([5]), cache=CacheConfig(prefix_scope="group")) as served:
        with pytest.raises(BadRequest, match="group: got ''; allowed: a name, because"):
            await served.client.generate_once([1])
        await served.client.generate_once([1], group="team")


async def test_administration_is_not_built_yet(serve):
    async with serve() as served:
        admin = pb_grpc.AdminStub(served.channel)
        with pytest.raises(grpc.aio.AioRpcError, match="jaxserve.v1.Admin.Drain") as caught:
            await admin.Drain(pb.DrainRequest())
        assert caught.value.code().name == NotBuilt.grpc_code
        with pytest.raises(grpc.aio.AioRpcError, match="not served by this build"):
            await admin.MigrateTransfer(iter([pb.MigrateTransferRequest()]))
