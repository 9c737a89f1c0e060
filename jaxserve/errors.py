"""The errors a user can meet, each with one wire code. Knows no transport: codes are names.

Every message says what was got, what is allowed and, where there is one, what to try.
"""

from typing import ClassVar


class JaxserveError(Exception):
    """Base of all errors that are answers; anything else that reaches the edge is our own bug."""

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500


class BadRequest(JaxserveError):
    """A field of a request is wrong. Carries the field, the value got and what is allowed."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, field: str, got: object, allowed: str):
        shown = repr(got)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}: got {shown}; allowed: {allowed}")
        self.field = field

    def renamed(self, field: str) -> "BadRequest":
        """The same error about a field that its reader knows under another name."""
        error = type(self).__new__(type(self))
        Exception.__init__(error, field + str(self).removeprefix(self.field))
        error.field = field
        return error


class TooLarge(BadRequest):
    """A message is longer than the server takes."""

    http_status = 413


class Unauthenticated(JaxserveError):
    """The call needs an API key and has none, or one that is not known."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class ConfigError(JaxserveError):
    """A flag, a file or a combination of them cannot be served; the launcher exits with code 2."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 400


class UnknownModel(JaxserveError):
    """The request names a model that this server does not have."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class QueueFull(JaxserveError):
    """The bounded queue has no place; `retry_after_s` says when to try again."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, *, retry_after_s: float):
        super().__init__(f"{message}; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeadlinePassed(JaxserveError):
    """The client's deadline, or the queue's own time-out, passed before the answer was complete."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class Cancelled(JaxserveError):
    """The client aborted the request."""

    grpc_code = "CANCELLED"
    http_status = 499


class NotReady(JaxserveError):
    """The server is loading, draining or restarting its engine: try elsewhere or later."""

    grpc_code = "UNAVAILABLE"
    http_status = 503


class NotBuilt(JaxserveError):
    """A whole call that this build does not serve yet."""

    grpc_code = "UNIMPLEMENTED"
    http_status = 501


class InternalError(JaxserveError):
    """Our own fault; `error_id` is in the log too."""

    def __init__(self, message: str, *, error_id: str):
        super().__init__(f"{message} (error id {error_id})")
        self.error_id = error_id
