"""A request and its answer as plain records. Knows no transport, no engine and no JAX.

`check_request` is the one place where a request's fields are judged; front end and engine both
call it. Defaults that a model brings along are judged by its part `check_sampling`.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.errors import BadRequest

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 16
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_REQUEST_ID_CHARS = 128


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and where a sample ends. Defaults follow the OpenAI API. Never changed
    once made; not frozen, which takes three times as long.

    `max_tokens` None means: up to the model's context. `seed` None means: the front end draws one.
    `logprobs` None means none; 0 the sampled token's; n > 0 also the n likeliest tokens'.
    Log-probabilities are the model's own, before bias, penalties and temperature.
    `prompt_logprobs` likewise, for prompt tokens.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_extras(self) -> bool:
        """Whether the row needs dense per-token state on the device (penalties or a bias)."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt and how it is to be continued. Never changed once made; not frozen, as above.

    `prompt` is int32 [T]. `page_keys` are the prefix-cache keys of its full pages, hashed once in
    the front end; `scope` is what they were hashed with, so that the engine can go on with the
    output's pages (None: the request takes no part in prefix sharing). Smaller `priority` is more
    urgent. `deadline_s` is on the engine's clock. `client` is the party that fairness is owed to,
    `weight` its share beside others'.
    """

    request_id: str
    prompt: np.ndarray
    params: SamplingParams
    client: str = "anonymous"
    weight: float = 1.0
    priority: int = 0
    arrived_s: float = 0.0
    deadline_s: float | None = None
    page_keys: tuple[bytes, ...] = ()
    scope: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a deployment accepts.

    `max_context` counts prompt and output tokens; `max_samples` is the most `n`.
    """

    vocab_size: int
    max_context: int
    max_samples: int
    max_priority: int = 1_000_000


class FinishReason(enum.Enum):
    """Why a sample ended."""

    STOP = "stop"  # end-of-sequence, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client, or somebody for it, ended the request
    DEADLINE = "deadline"  # its deadline or the queue's time-out passed
    ERROR = "error"  # our own fault


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and, on request, of the likeliest tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Delta:
    """What one slice added to one sample of a request. `finish` is set on a sample's last delta.
    Never changed once made; not frozen, which takes three times as long.

    `stop_match` is the token id that ended the sample (end-of-sequence or a stop token id); it is
    the last of `tokens`, and the front end leaves it out of the text unless `include_stop`.
    `prompt_logprobs` comes once, with the request's first delta.
    """

    request_id: str
    sample: int
    tokens: Sequence[int]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop_match: int | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    message: str = ""


def check_request(request: Request, limits: Limits) -> None:
    """Judge every field. Raises BadRequest with the field, the value got and what is allowed."""
    if not 0 < len(request.request_id) <= MAX_REQUEST_ID_CHARS:
        raise BadRequest(
            "request_id", request.request_id, f"1 to {MAX_REQUEST_ID_CHARS} characters"
        )
    if abs(request.priority) > limits.max_priority:
        allowed = f"-{limits.max_priority} to {limits.max_priority} (smaller is more urgent)"
        raise BadRequest("priority", request.priority, allowed)
    if not (math.isfinite(request.weight) and request.weight > 0):
        raise BadRequest("weight", request.weight, "a positive number")
    if request.deadline_s is not None and not math.isfinite(request.deadline_s):
        raise BadRequest("deadline", request.deadline_s, "a time, in seconds")
    _check_prompt(request.prompt, limits)
    _check_lengths(request, limits)
    check_sampling(request.params)
    _check_stops(request.params, limits)


def _check_prompt(prompt: np.ndarray, limits: Limits) -> None:
    if prompt.ndim != 1 or prompt.size == 0:
        raise BadRequest("prompt", prompt.tolist(), "at least one token")
    if prompt.size >= limits.max_context:
        allowed = (
            f"at most {limits.max_context - 1} tokens (the model's context is {limits.max_context})"
        )
        raise BadRequest("prompt", f"{prompt.size} tokens", allowed)
    # Not min and max: a part of them is written in Python, and takes most of the time here.
    if prompt[prompt.argmin()] < 0 or prompt[prompt.argmax()] >= limits.vocab_size:
        place = int(np.flatnonzero((prompt < 0) | (prompt >= limits.vocab_size))[0])
        raise BadRequest(
            f"prompt token_ids[{place}]", int(prompt[place]), f"0 to {limits.vocab_size - 1}"
        )


def _check_lengths(request: Request, limits: Limits) -> None:
    params, room = request.params, limits.max_context - request.prompt.size
    if params.max_tokens is not None and not 1 <= params.max_tokens <= room:
        allowed = (
            f"1 to {room} (context {limits.max_context} less {request.prompt.size} prompt tokens)"
        )
        raise BadRequest("max_tokens", params.max_tokens, allowed)
    most = room if params.max_tokens is None else params.max_tokens
    if not 0 <= params.min_tokens <= most:
        raise BadRequest("min_tokens", params.min_tokens, f"0 to max_tokens ({most})")
    if not 1 <= params.n <= limits.max_samples:
        raise BadRequest("n", params.n, f"1 to {limits.max_samples}")


def _check_number(
    name: str, value: float, least: float, most: float, *, open_least: bool = False
) -> None:
    # What is not finite is not inside either.
    if not ((least < value if open_least else least <= value) and value <= most):
        bracket = "(" if open_least else "["
        raise BadRequest(name, value, f"a number in {bracket}{least:g}, {most:g}]")


def check_sampling(params: SamplingParams) -> None:
    """Judge what holds in every deployment: ranges of numbers. Raises BadRequest."""
    _check_number("temperature", params.temperature, 0.0, 100.0)
    _check_number("top_p", params.top_p, 0.0, 1.0, open_least=True)
    _check_number("min_p", params.min_p, 0.0, 1.0)
    _check_number("repetition_penalty", params.repetition_penalty, 0.0, 100.0, open_least=True)
    _check_number("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if not 0 <= params.top_k < 2**31:
        raise BadRequest("top_k", params.top_k, "0 (off) or a positive int32")
    if params.seed is not None and not 0 <= params.seed < 2**63:
        raise BadRequest("seed", params.seed, "0 to 2^63 - 1")
    for name, value in (
        ("logprobs", params.logprobs),
        ("prompt_logprobs", params.prompt_logprobs),
    ):
        if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
            raise BadRequest(name, value, f"0 to {MAX_TOP_LOGPROBS}")


def _check_stops(params: SamplingParams, limits: Limits) -> None:
    if not (params.stop or params.stop_token_ids or params.logit_bias):
        return
    if len(params.stop) > MAX_STOP_STRINGS:
        raise BadRequest(
            "stop", f"{len(params.stop)} strings", f"at most {MAX_STOP_STRINGS} strings"
        )
    for place, text in enumerate(params.stop):
        if not 0 < len(text) <= MAX_STOP_STRING_CHARS:
            raise BadRequest(f"stop[{place}]", text, f"1 to {MAX_STOP_STRING_CHARS} characters")
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        got = f"{len(params.stop_token_ids)} ids"
        raise BadRequest("stop_token_ids", got, f"at most {MAX_STOP_TOKEN_IDS} ids")
    for place, token in enumerate(params.stop_token_ids):
        if not 0 <= token < limits.vocab_size:
            raise BadRequest(f"stop_token_ids[{place}]", token, f"0 to {limits.vocab_size - 1}")
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        got = f"{len(params.logit_bias)} entries"
        raise BadRequest("logit_bias", got, f"at most {MAX_LOGIT_BIAS} entries")
    for token, bias in params.logit_bias.items():
        if not 0 <= token < limits.vocab_size:
            raise BadRequest("logit_bias", token, f"token ids 0 to {limits.vocab_size - 1}")
        _check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)
