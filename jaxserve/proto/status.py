"""Errors as gRPC statuses and back: the one table between `jaxserve.errors` and the wire.

Knows code names and trailing metadata. Knows no channel and no server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import grpc

from jaxserve.errors import (
    BadRequest,
    Cancelled,
    ConfigError,
    DeadlinePassed,
    InternalError,
    JaxserveError,
    NotBuilt,
    NotReady,
    QueueFull,
    Unauthenticated,
    UnknownModel,
)

FIELD_KEY: Final = "error-field"
ERROR_ID_KEY: Final = "error-id"
RETRY_DELAY_KEY: Final = "retry-delay-ms"
RETRY_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
"""gRPC's own name for a retry delay: clients with a retry policy obey it without our help."""

_CODES: Final = {code.name: code for code in grpc.StatusCode}
_PLAIN: Final[dict[str, type[JaxserveError]]] = {
    error.grpc_code: error
    for error in (
        UnknownModel,
        ConfigError,
        DeadlinePassed,
        Cancelled,
        NotReady,
        NotBuilt,
        Unauthenticated,
    )
}


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ends that did not succeed."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str], ...] = ()


def to_status(error: JaxserveError) -> Status:
    """The status a call ends with because of `error`."""
    metadata: tuple[tuple[str, str], ...] = ()
    match error:
        case QueueFull():
            delay_ms = str(max(1, round(1000 * error.retry_after_s)))
            metadata = ((RETRY_DELAY_KEY, delay_ms), (RETRY_PUSHBACK_KEY, delay_ms))
        case BadRequest():
            # Metadata values are printable ASCII; a field's name may hold what the client sent.
            metadata = ((FIELD_KEY, error.field.encode("ascii", "replace").decode()),)
        case InternalError():
            metadata = ((ERROR_ID_KEY, error.error_id),)
    return Status(_CODES[error.grpc_code], str(error), metadata)


def from_status(code: str, message: str, metadata: Mapping[str, str]) -> JaxserveError:
    """The error that a status with the code named `code` stands for; the inverse of `to_status`."""
    if code in _PLAIN:
        return _PLAIN[code](message)
    if code == "RESOURCE_EXHAUSTED" and RETRY_DELAY_KEY in metadata:
        return _worded(QueueFull, message, retry_after_s=int(metadata[RETRY_DELAY_KEY]) / 1000)
    if code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"):
        # RESOURCE_EXHAUSTED without a delay is gRPC's own: a message beyond its hard size limit.
        return _worded(BadRequest, message, field=metadata.get(FIELD_KEY, "message"))
    if ERROR_ID_KEY in metadata:
        return _worded(InternalError, message, error_id=metadata[ERROR_ID_KEY])
    return InternalError(f"{code}: {message}", error_id="none")


def _worded(kind: type[JaxserveError], message: str, **attributes: object) -> JaxserveError:
    """An error whose message was worded already, so that its constructor must not word it again."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error
