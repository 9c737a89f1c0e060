"""What the front end writes down: one JSON line for each request, and faults under an error id.

Prompts and answers are never written; request ids, counts and times are.
"""

import json
import logging
import time
import uuid
from dataclasses import asdict, dataclass
from typing import TextIO

from jaxserve.errors import InternalError

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request's line. Times are seconds since it arrived; `code` is a gRPC code's name.

    `trusted` says that an API key named the client.
    """

    request_id: str
    method: str
    model: str
    peer: str
    client: str = ""
    trusted: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    samples: int = 1
    finish: tuple[str, ...] = ()
    first_token_s: float | None = None
    total_s: float = 0.0
    code: str = "OK"
    error: str = ""


class RequestLog:
    """Writes records to `stream`, one JSON object a line, at once; None writes nothing."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, record: RequestRecord) -> None:
        if self._stream is not None:
            line = {"time_s": round(time.time(), 3), "event": "request", **asdict(record)}
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()


def log_fault(doing: str) -> InternalError:
    """Log the exception being handled, with its traceback, under a fresh id; the answer to give."""
    error = InternalError(f"fault while {doing}", error_id=uuid.uuid4().hex[:12])
    logger.exception("%s", error)
    return error
