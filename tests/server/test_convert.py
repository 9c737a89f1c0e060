import numpy as np
import pytest

from jaxserve.errors import BadRequest, InternalError, NotReady, QueueFull
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.convert import given_sampling, sampling_to_proto
from jaxserve.proto.status import from_status, to_status
from jaxserve.request import Delta, FinishReason, Request, SamplingParams, TokenLogprob
from jaxserve.server import convert

PARAMS = SamplingParams(
    max_tokens=7,
    min_tokens=2,
    ignore_eos=True,
    temperature=0.0,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.5,
    logit_bias={3: -1.5},
    seed=2**62,
    stop=("a", "b"),
    stop_token_ids=(1, 2),
    include_stop=True,
    n=3,
    logprobs=0,
    prompt_logprobs=4,
)


@pytest.mark.parametrize("params", [PARAMS, SamplingParams()])
def test_sampling_survives_the_wire(params):
    assert SamplingParams(**given_sampling(sampling_to_proto(params))) == params


def test_absent_fields_are_the_records_defaults():
    assert SamplingParams(**given_sampling(pb.SamplingParams())) == SamplingParams()


def test_a_request_survives_the_wire_without_its_stop_strings():
    prompt = np.array([5, 6, 70000], np.int32)
    request = Request(
        request_id="r", prompt=prompt, params=PARAMS, client="c", priority=-2, page_keys=(b"k",)
    )
    submit = convert.submit_to_proto(request)
    submit.timeout_s = 2.5
    back = convert.submit_from_proto(submit, now_s=100.0)
    assert back.prompt.dtype == np.int32 and back.prompt.tolist() == [5, 6, 70000]
    assert (back.arrived_s, back.deadline_s) == (100.0, 102.5)
    assert (back.request_id, back.client, back.priority, back.page_keys) == ("r", "c", -2, (b"k",))
    assert back.params.stop == () and back.params.seed == PARAMS.seed
    assert back.prompt.flags.writeable


def test_a_report_carries_every_field_of_its_deltas():
    delta = Delta(
        request_id="r",
        sample=1,
        tokens=(4, 0),
        logprobs=(TokenLogprob(4, -0.5, ((4, -0.5), (9, -2.0))), TokenLogprob(0, -1.0)),
        finish=FinishReason.STOP,
        stop_match=0,
        prompt_tokens=3,
        cached_tokens=2,
        prompt_logprobs=(None, TokenLogprob(6, -3.0)),
        message="m",
    )
    error = QueueFull("full", retry_after_s=1.5)
    report = convert.report_to_proto(9, [delta], [("q", error)], attempts={"r": 4, "q": 5})
    (row,), (rejected,) = report.deltas, report.rejected
    assert (report.dispatch, row.attempt, row.sample, list(row.token_ids)) == (9, 4, 1, [4, 0])
    assert (row.finish, row.stop_token_id) == (pb.FINISH_REASON_STOP, 0)
    assert (row.prompt_tokens, row.cached_tokens, row.message) == (3, 2, "m")
    assert row.logprobs[0].top[1].token_id == 9
    assert not row.prompt_logprobs[0].HasField("value")
    assert row.prompt_logprobs[1].value.logprob == -3.0
    back = convert.rejection_from_proto(rejected)
    assert isinstance(back, QueueFull) and str(back) == str(error) and back.retry_after_s == 1.5
    wrong = BadRequest("prompt", 3, "a text")
    back = convert.rejection_from_proto(convert.rejection_to_proto("r", wrong, attempt=1))
    assert isinstance(back, BadRequest) and (back.field, str(back)) == ("prompt", str(wrong))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (SamplingParams(max_tokens=-1), "max_tokens: got -1; allowed: a non-negative int"),
        (SamplingParams(stop_token_ids=(-7,)), r"stop_token_ids: got \(-7,\); allowed: token ids"),
        (SamplingParams(logit_bias={-1: 0.0}), "logit_bias: got {-1: 0.0}; allowed: token ids"),
    ],
)
def test_what_has_no_place_on_the_wire_is_named(params, words):
    with pytest.raises(BadRequest, match=words):
        sampling_to_proto(params)


@pytest.mark.parametrize(
    "error",
    [
        BadRequest("top_p", 2, "less"),
        QueueFull("full", retry_after_s=0.25),
        NotReady("later"),
        InternalError("fault", error_id="abc"),
    ],
)
def test_an_error_survives_its_status(error):
    status = to_status(error)
    back = from_status(status.code.name, status.message, dict(status.metadata))
    assert type(back) is type(error) and str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_status_that_is_not_ours_is_internal():
    assert str(from_status("UNKNOWN", "boom", {})) == "UNKNOWN: boom (error id none)"
