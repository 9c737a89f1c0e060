"""Damage that no client of ours would send; what users can meet is in test_bad_input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import BadRequest
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.wire import parse

MESSAGE = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[1, 300, 70000]),
    sampling=pb.SamplingParams(
        temperature=0.5, stop=["a", "é"], logit_bias={7: -1.0}, stop_token_ids=[1, 2], seed=2**60
    ),
    priority=-3,
    detokenize=False,
)
DATA = MESSAGE.SerializeToString()


def test_a_whole_message_is_parsed():
    assert parse(pb.GenerateRequest, DATA, max_bytes=1000) == MESSAGE


def test_numbers_may_come_packed_or_one_by_one():
    apart = bytes([2 << 3, 5, 2 << 3, 6])  # DetokenizeRequest.token_ids, each with its own tag
    assert list(parse(pb.DetokenizeRequest, apart, max_bytes=9).token_ids) == [5, 6]


@given(data=st.binary(max_size=40))
def test_any_bytes_are_a_message_or_bad_request(data):
    try:
        message = parse(pb.GenerateRequest, data, max_bytes=1000)
    except BadRequest as error:
        assert "got" in str(error) and "allowed" in str(error)
    else:
        assert isinstance(message, pb.GenerateRequest)


@given(place=st.integers(0, len(DATA) - 1), value=st.integers(0, 255))
def test_a_changed_byte_is_a_message_or_bad_request(place, value):
    changed = DATA[:place] + bytes([value]) + DATA[place + 1 :]
    try:
        parse(pb.GenerateRequest, changed, max_bytes=1000)
    except BadRequest as error:
        assert error.field


@pytest.mark.parametrize("length", range(1, len(DATA)))
def test_a_cut_message_names_the_damage_or_lacks_fields(length):
    try:
        assert parse(pb.GenerateRequest, DATA[:length], max_bytes=1000) != MESSAGE
    except BadRequest as error:
        assert "damaged bytes" in str(error)
