"""Records that clients and servers share, as messages of `jaxserve.v1` and back. Judges nothing."""

from collections.abc import Mapping
from typing import Final

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
    "top_p",
    "repetition_penalty",
    "seed",
    "n",
    "logprobs",
    "prompt_logprobs",
)
_PLAIN = (
    "min_tokens",
    "ignore_eos",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "include_stop",
)


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """Absent optional fields take the record's defaults."""
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    return SamplingParams(
        **given,
        **{name: getattr(message, name) for name in _PLAIN},
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
    )


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Every field is written out but those that are None.

    Raises BadRequest naming a field whose value has no place on the wire, such as a negative count.
    """
    message = pb.SamplingParams()
    for name in _OPTIONAL + _PLAIN:
        value = getattr(params, name)
        if value is not None:
            try:
                setattr(message, name, value)
            except (ValueError, TypeError):
                wanted = type(getattr(message, name)).__name__
                allowed = f"a non-negative {wanted}" if wanted == "int" else f"a {wanted}"
                raise BadRequest(name, value, allowed) from None
    for name in ("logit_bias", "stop", "stop_token_ids"):
        _set_many(message, name, getattr(params, name))
    return message


def _set_many(message: pb.SamplingParams, name: str, values: object) -> None:
    target = getattr(message, name)
    try:
        (target.update if isinstance(values, Mapping) else target.extend)(values)
    except (ValueError, TypeError):
        allowed = "a sequence of strings" if name == "stop" else "token ids, not negative"
        raise BadRequest(name, values, allowed) from None
