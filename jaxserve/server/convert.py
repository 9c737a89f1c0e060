"""What front end and engine tell each other, as messages of `jaxserve.v1` and back. Judges nothing.

Both processes use it: the front end for Submit and what comes back, the engine for the reverse.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from jaxserve.errors import BadRequest, JaxserveError, QueueFull
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.convert import (
    REASON_FROM_PROTO,
    REASON_TO_PROTO,
    given_sampling,
    sampling_to_proto,
)
from jaxserve.proto.status import FIELD_KEY, RETRY_DELAY_KEY, from_status
from jaxserve.request import Delta, Request, SamplingParams, TokenLogprob
from jaxserve.schedulers.service_meter import ClientService

__all__ = [
    "REASON_FROM_PROTO",
    "client_to_proto",
    "logprob_to_proto",
    "rejection_from_proto",
    "rejection_to_proto",
    "report_to_proto",
    "submit_from_proto",
    "submit_to_proto",
]


def submit_to_proto(request: Request) -> pb.Submit:
    """A judged request for a replica. The link adds `timeout_s` and `attempt` when it sends."""
    sampling = sampling_to_proto(request.params)
    sampling.ClearField("stop")
    return pb.Submit(
        request_id=request.request_id,
        prompt=request.prompt.astype("<i4").tobytes(),
        sampling=sampling,
        client=request.client,
        weight=request.weight,
        priority=request.priority,
        page_keys=request.page_keys,
        scope=request.scope,
    )


def submit_from_proto(submit: pb.Submit, *, now_s: float) -> Request:
    """A Submit as the engine's record; `now_s` is on the engine's clock."""
    return Request(
        request_id=submit.request_id,
        prompt=np.frombuffer(submit.prompt, "<i4").astype(np.int32),
        params=SamplingParams(**given_sampling(submit.sampling)),
        client=submit.client,
        weight=submit.weight if submit.HasField("weight") else 1.0,
        priority=submit.priority,
        arrived_s=now_s,
        deadline_s=now_s + submit.timeout_s if submit.HasField("timeout_s") else None,
        page_keys=tuple(submit.page_keys),
        scope=submit.scope if submit.HasField("scope") else None,
    )


def report_to_proto(
    dispatch: int,
    deltas: Iterable[Delta],
    rejections: Iterable[tuple[str, JaxserveError]],
    *,
    attempts: Mapping[str, int],
) -> pb.EngineReport:
    """One slice's outcome; a rejection is a request id and the error.

    `attempts` holds the attempt under which each request was submitted.
    """
    return pb.EngineReport(
        dispatch=dispatch,
        deltas=[_delta_to_proto(delta, attempts[delta.request_id]) for delta in deltas],
        rejected=[
            rejection_to_proto(request_id, error, attempt=attempts[request_id])
            for request_id, error in rejections
        ],
    )


def _delta_to_proto(delta: Delta, attempt: int) -> pb.RowDelta:
    message = pb.RowDelta(
        request_id=delta.request_id,
        sample=delta.sample,
        token_ids=delta.tokens,
        finish=REASON_TO_PROTO[delta.finish],
        stop_token_id=delta.stop_match,
        prompt_tokens=delta.prompt_tokens,
        cached_tokens=delta.cached_tokens,
        attempt=attempt,
        message=delta.message,
    )
    if delta.logprobs:
        message.logprobs.extend(map(logprob_to_proto, delta.logprobs))
    for value in delta.prompt_logprobs:
        place = message.prompt_logprobs.add()
        if value is not None:
            place.value.CopyFrom(logprob_to_proto(value))
    return message


def logprob_to_proto(value: TokenLogprob) -> pb.TokenLogprob:
    """One token's log-probability, without texts."""
    return pb.TokenLogprob(
        token_id=value.token,
        logprob=value.logprob,
        top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in value.top],
    )


def client_to_proto(client: ClientService, *, bound: float) -> pb.ClientStatistics:
    """What an engine says of a client; the front end adds its own counts."""
    return pb.ClientStatistics(
        client=client.client,
        weight=client.weight,
        service=client.service,
        service_uncached=client.service_uncached,
        credit=client.credit or 0.0,
        has_credit=client.credit is not None,
        bound=bound,
        served=pb.ServedTokens(
            computed=client.computed, cached=client.cached, output=client.output
        ),
    )


def rejection_to_proto(request_id: str, error: JaxserveError, *, attempt: int) -> pb.Rejected:
    """A refusal of the engine on its way to the front end."""
    return pb.Rejected(
        request_id=request_id,
        code=error.grpc_code,
        message=str(error),
        retry_after_s=error.retry_after_s if isinstance(error, QueueFull) else 0.0,
        attempt=attempt,
        field=error.field if isinstance(error, BadRequest) else "",
    )


def rejection_from_proto(rejected: pb.Rejected) -> JaxserveError:
    """The error that the engine refused a request with."""
    metadata: dict[str, str] = {}
    if rejected.code == "RESOURCE_EXHAUSTED":
        metadata[RETRY_DELAY_KEY] = str(math.ceil(1000 * rejected.retry_after_s))
    if rejected.field:
        metadata[FIELD_KEY] = rejected.field
    return from_status(rejected.code, rejected.message, metadata)
