"""Answers in OpenAI's shapes: whole bodies, stream chunks, usage, errors. Knows JSON, no socket.

Source: the API reference of OpenAI, platform.openai.com/docs/api-reference, 2026. `stop_reason` and
`token_ids` of a choice are vLLM's additions.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jaxserve.errors import (
    BadRequest,
    DeadlinePassed,
    InternalError,
    JaxserveError,
    NotReady,
    QueueFull,
    Unauthenticated,
    UnknownModel,
)
from jaxserve.proto import jaxserve_v1_pb2 as pb

LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON does not have."""

_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}
_ERROR_TYPES: Final[tuple[tuple[type[JaxserveError], str, str | None], ...]] = (
    (Unauthenticated, "authentication_error", "invalid_api_key"),
    (UnknownModel, "invalid_request_error", "model_not_found"),
    (BadRequest, "invalid_request_error", None),
    (QueueFull, "rate_limit_error", "queue_full"),
    (DeadlinePassed, "timeout_error", "deadline_passed"),
    (NotReady, "service_unavailable_error", "not_ready"),
    (InternalError, "server_error", None),
)


def says_something(message: pb.GenerateResponse) -> bool:
    """Whether there is anything to write: an end by an error has nothing to say, the error has."""
    return bool(message.token_ids or message.text) or message.finish.reason in _REASONS


def error_body(error: JaxserveError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    kind, code = "server_error", None
    for known, kind_, code_ in _ERROR_TYPES:
        if isinstance(error, known):
            kind, code = kind_, code_
            break
    if isinstance(error, InternalError):
        code = error.error_id
    param = error.field if isinstance(error, BadRequest) else None
    if isinstance(error, UnknownModel):
        param = "model"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def usage_body(usages: Iterable[pb.Usage]) -> dict[str, Any]:
    """Token counts over all prompts of a body."""
    prompt = cached = completion = 0
    for usage in usages:
        prompt += usage.prompt_tokens
        cached += usage.cached_tokens
        completion += usage.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass(slots=True, kw_only=True)
class Writer(ABC):
    """Writes the answer of one body, chunk by chunk or whole.

    `model` and `request_id` are what the body's answer carries. `token_bytes` gives the bytes of a
    token, for log-probabilities. `with_ids` adds token ids to choices; `stop_ids` are the
    request's stop token ids, `usage_in_chunks` says whether chunks have a `usage` (null).
    """

    model: str
    request_id: str
    token_bytes: Callable[[int], bytes | None]
    with_ids: bool = False
    stop_ids: Sequence[int] = ()
    usage_in_chunks: bool = False
    _created: int = field(default_factory=lambda: int(time.time()))

    object_name = ""
    chunk_name = ""
    id_prefix = ""

    def whole(self, choices: list[dict[str, Any]], usages: Iterable[pb.Usage]) -> dict[str, Any]:
        """A whole answer."""
        return self._frame(self.object_name, choices) | {"usage": usage_body(usages)}

    def chunk(self, index: int, message: pb.GenerateResponse) -> dict[str, Any]:
        """What one slice added to the choice `index`."""
        return self._chunk([self.delta(index, message)])

    def usage_chunk(self, usages: Iterable[pb.Usage]) -> dict[str, Any]:
        """The last chunk of a stream that was asked to count."""
        return self._frame(self.chunk_name, []) | {"usage": usage_body(usages)}

    @abstractmethod
    def choice(self, index: int, message: pb.GenerateResponse) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def delta(self, index: int, message: pb.GenerateResponse) -> dict[str, Any]:
        """A choice of a chunk."""

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        frame = self._frame(self.chunk_name, choices)
        return frame | {"usage": None} if self.usage_in_chunks else frame

    def _frame(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id_prefix + self.request_id,
            "object": name,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _ending(self, message: pb.GenerateResponse) -> dict[str, Any]:
        """What every choice says about its end."""
        ending: dict[str, Any] = {"finish_reason": None}
        if message.HasField("finish"):
            finish = message.finish
            ending["finish_reason"] = _REASONS.get(finish.reason)  # an error follows its end
            match finish.WhichOneof("matched"):
                case "stop_string":
                    ending["stop_reason"] = finish.stop_string
                case "stop_token_id" if finish.stop_token_id in self.stop_ids:
                    ending["stop_reason"] = finish.stop_token_id
        if self.with_ids:
            ending["token_ids"] = list(message.token_ids)
        return ending


@dataclass(slots=True, kw_only=True)
class CompletionWriter(Writer):
    """Answers of /v1/completions. `echoes` are the prompts that choices begin with, if any."""

    echoes: Sequence[str] = ()
    num_samples: int = 1
    _offsets: dict[int, int] = field(default_factory=dict)

    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def choice(self, index: int, message: pb.GenerateResponse) -> dict[str, Any]:
        is_first = index not in self._offsets
        echo = self.echoes[index // self.num_samples] if self.echoes and is_first else ""
        self._offsets.setdefault(index, len(echo))
        return {
            "index": index,
            "text": echo + message.text,
            "logprobs": self._logprobs(index, message.logprobs),
            **self._ending(message),
        }

    def delta(self, index: int, message: pb.GenerateResponse) -> dict[str, Any]:
        return self.choice(index, message)  # in this dialect a chunk's is the same

    def _logprobs(self, index: int, logprobs: Sequence[pb.TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        offsets = []
        for logprob in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(logprob.text)
        return {
            "tokens": [logprob.text for logprob in logprobs],
            "token_logprobs": [_finite(logprob.logprob) for logprob in logprobs],
            "top_logprobs": [
                {top.text: _finite(top.logprob) for top in logprob.top} for logprob in logprobs
            ],
            "text_offset": offsets,
        }


@dataclass(slots=True, kw_only=True)
class ChatWriter(Writer):
    """Answers of /v1/chat/completions."""

    _begun: set[int] = field(default_factory=set)

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def choice(self, index: int, message: pb.GenerateResponse) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": message.text, "refusal": None},
            "logprobs": self._logprobs(message.logprobs),
            **self._ending(message),
        }

    def delta(self, index: int, message: pb.GenerateResponse) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": message.text}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", **delta}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(message.logprobs),
            **self._ending(message),
        }

    def _logprobs(self, logprobs: Sequence[pb.TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            {
                **self._token(logprob),
                "top_logprobs": [self._token(top) for top in logprob.top],
            }
            for logprob in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: pb.TokenLogprob | pb.TopLogprob) -> dict[str, Any]:
        spelt = self.token_bytes(token.token_id)
        return {
            "token": token.text,
            "logprob": _finite(token.logprob),
            "bytes": None if spelt is None else list(spelt),
        }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
