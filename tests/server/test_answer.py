"""An answer is the same however its tokens were sliced, and whenever it was read."""

import asyncio

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.request import Request, SamplingParams
from jaxserve.server.answer import Answer


class Calls:
    """Row control that writes down what it was told."""

    def __init__(self):
        self.aborts = []
        self.limits = []

    def abort(self, request_id, *, sample, reason, keep_tokens):
        self.aborts.append(keep_tokens)

    def limit_row(self, request_id, *, sample, max_steps):
        self.limits.append(max_steps)


def play(tokenizer, ids, cuts, params, *, read_every=1):
    """Text, ids, finish and the calls made when `ids` come in slices as long as `cuts` says."""
    request = Request(request_id="r", prompt=np.array([1], np.int32), params=params)
    calls = Calls()
    answer = Answer(
        request,
        calls,
        make_detokenizer=lambda: tokenizer.detokenizer([]),
        token_text=tokenizer.token_text,
        once=False,
    )
    messages, start = [], 0
    for number, cut in enumerate([*cuts, len(ids)]):
        part = ids[start : start + cut]
        start += len(part)
        end = pb.FINISH_REASON_LENGTH if start == len(ids) else pb.FINISH_REASON_UNSPECIFIED
        answer.on_delta(pb.RowDelta(request_id="r", token_ids=part, finish=end))
        if number % read_every == 0:
            messages += answer._take_pending()
        if answer.done:
            break
    messages += answer._take_pending()
    text = "".join(message.text for message in messages)
    out = [id for message in messages for id in message.token_ids]
    return text, out, messages[-1].finish, messages[-1].usage.completion_tokens, calls


WORDS = st.lists(st.sampled_from(["ab", "ba", "é", "🙂", "b.", "a"]), max_size=14).map("".join)
STOPS = st.lists(st.text("ab.é🙂", min_size=1, max_size=4), max_size=3).map(tuple)


@given(
    text=WORDS,
    stops=STOPS,
    cuts=st.lists(st.integers(1, 6), max_size=10),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    read_every=st.integers(1, 5),
)
def test_slices_change_nothing(tokenizer, text, stops, cuts, min_tokens, include, read_every):
    ids = tokenizer.encode(text).tolist() or [0]
    params = SamplingParams(stop=stops, min_tokens=min_tokens, include_stop=include)
    alone = play(tokenizer, ids, [1] * len(ids), params)
    sliced = play(tokenizer, ids, cuts, params, read_every=read_every)
    assert sliced[:2] == alone[:2] and sliced[2] == alone[2] and sliced[3] == alone[3]
    shown, out, finish, num_tokens, calls = sliced
    assert num_tokens == len(out) and ids[: len(out)] == out
    if finish.WhichOneof("matched") == "stop_string":
        assert len(out) > min_tokens and shown in tokenizer.decode(out)
        assert calls.aborts in ([], [len(out)])
        assert finish.stop_string in tokenizer.decode(out)
        assert not shown.endswith(finish.stop_string) or include or finish.stop_string in text
    else:
        assert shown == tokenizer.decode(ids)
    assert calls.limits == [4, 0] * (len(calls.limits) // 2) + [4] * (len(calls.limits) % 2)


def test_once_wakes_its_writer_at_the_end_alone(tokenizer):
    async def main():
        request = Request(
            request_id="r", prompt=np.array([1], np.int32), params=SamplingParams(n=2)
        )
        answer = Answer(request, Calls(), make_detokenizer=None, token_text=str, once=True)
        task = asyncio.create_task(answer.next_messages())
        for sample in (0, 1):
            answer.on_delta(pb.RowDelta(sample=sample, token_ids=[1]))
            await asyncio.sleep(0)
            assert not task.done()
        for sample in (0, 1):
            answer.on_delta(
                pb.RowDelta(sample=sample, token_ids=[2], finish=pb.FINISH_REASON_LENGTH)
            )
        messages = await task
        assert [list(message.token_ids) for message in messages] == [[1, 2], [1, 2]]
        assert [message.HasField("usage") for message in messages] == [False, True]
        assert await answer.next_messages() == []

    asyncio.run(main())
