"""Records that clients and servers share, as messages of `jaxserve.v1` and back. Judges nothing."""

from collections.abc import Mapping
from typing import Any, Final

from jaxserve.errors import BadRequest
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.request import FinishReason, SamplingParams

REASON_TO_PROTO: Final = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
REASON_FROM_PROTO: Final = {value: reason for reason, value in REASON_TO_PROTO.items()}

_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "n",
    "logprobs",
    "prompt_logprobs",
)
_PLAIN = (
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "include_stop",
)


_MANY = ("logit_bias", "stop", "stop_token_ids")
SAMPLING_FIELDS: Final = _OPTIONAL + _PLAIN + _MANY


def given_sampling(message: pb.SamplingParams) -> dict[str, Any]:
    """Fields of `SamplingParams` that the message sets; absent optional fields are left out."""
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    given.update((name, getattr(message, name)) for name in _PLAIN)
    return given | {
        "logit_bias": dict(message.logit_bias),
        "stop": tuple(message.stop),
        "stop_token_ids": tuple(message.stop_token_ids),
    }


def sampling_to_proto(params: SamplingParams | Mapping[str, Any]) -> pb.SamplingParams:
    """A record is written out whole but for fields that are None; a mapping as far as it goes.

    Raises BadRequest naming a field that does not exist, or whose value has no place on the wire,
    such as a negative count.
    """
    given = (
        params
        if isinstance(params, Mapping)
        else {name: getattr(params, name) for name in SAMPLING_FIELDS}
    )
    for name in given:
        if name not in SAMPLING_FIELDS:
            raise BadRequest("sampling", name, f"the fields {', '.join(SAMPLING_FIELDS)}")
    message = pb.SamplingParams()
    for name in _OPTIONAL + _PLAIN:
        value = given.get(name)
        if value is not None:
            try:
                setattr(message, name, value)
            except (ValueError, TypeError):
                wanted = type(getattr(message, name)).__name__
                allowed = f"a non-negative {wanted}" if wanted == "int" else f"a {wanted}"
                raise BadRequest(name, value, allowed) from None
    for name in _MANY:
        if name in given:
            _set_many(message, name, given[name])
    return message


def _set_many(message: pb.SamplingParams, name: str, values: object) -> None:
    target = getattr(message, name)
    try:
        (target.update if isinstance(values, Mapping) else target.extend)(values)
    except (ValueError, TypeError):
        allowed = "a sequence of strings" if name == "stop" else "token ids, not negative"
        raise BadRequest(name, values, allowed) from None
