"""A workload at another rate, with other lengths, fewer requests, or inside a model's context.

Knows no format and no generator: it wraps any workload, and reads it as it is read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice

from jaxserve.errors import ConfigError
from jaxserve.workload.work import Work, Workload


def scaled(
    workload: Workload,
    *,
    rate: float | None = None,
    time_scale: float | None = None,
    length_scale: float = 1.0,
    most_prompt: int = 0,
    most_output: int = 0,
    num_requests: int | None = None,
    max_tokens: int = 0,
    max_context: int | None = None,
    cut: bool = False,
) -> Workload:
    """`workload`, changed in this order; what is not named stays as it is.

    `num_requests`: only the first so many. `time_scale` multiplies arrivals and think times (0.5:
    twice as fast), `rate` does so that there are so many requests per second; deadlines and aborts
    stay. `length_scale` multiplies prompts, outputs and the size of a block, rounded up; then
    prompts of more than `most_prompt` tokens and outputs of more than `most_output` are cut to that
    (0: not at all).
    `max_tokens` is the limit each request states, but never less than its output; 0: as it is,
    which for most workloads is exactly the output. `max_context`: no request has more tokens,
    prompt and stated limit together. A longer one is refused, or with `cut` made to fit: its
    output keeps at most half of the context, its prompt's end goes.

    Raises ConfigError for a number that is not allowed, and for the first request that is too long.
    """
    if rate is not None and time_scale is not None:
        raise ConfigError(f"time_scale: got {time_scale} and rate={rate}; allowed: one of them")
    if num_requests is not None:
        workload = _first(workload, num_requests, measure=rate is not None)
    if rate is not None:
        _require_positive("rate", rate)
        if workload.rate <= 0:
            allowed = f"unset, for {workload.name} has no rate: its requests arrive all at once"
            raise ConfigError(f"rate: got {rate}; allowed: {allowed}")
        time_scale = workload.rate / rate
    _require_positive("length_scale", length_scale)
    ratio = Fraction(length_scale).limit_denominator(1_000_000)
    change = _Change(
        time_scale=1.0 if time_scale is None else time_scale,
        numerator=ratio.numerator,
        denominator=ratio.denominator,
        old_block_size=workload.block_size,
        most_prompt=most_prompt,
        most_output=most_output,
        max_tokens=max_tokens,
        max_context=max_context,
        cut=cut,
    )
    if change.nothing:
        return workload
    requests = workload.requests
    result = replace(
        workload,
        requests=lambda: map(change.apply, requests()),
        block_size=change.block_size,
        rate=workload.rate / change.time_scale,
        longest_tokens=change.longest(workload.longest_tokens),
        described={**workload.described, **change.described()},
    )
    if max_context is not None and not cut and not 0 < result.longest_tokens <= max_context:
        _require_fits(result, max_context)
    return result


def _require_positive(name: str, got: float) -> None:
    if not (math.isfinite(got) and got > 0):
        raise ConfigError(f"{name}: got {got}; allowed: a positive number")


def _first(workload: Workload, num_requests: int, *, measure: bool) -> Workload:
    """The first requests. Their own rate is measured where it is asked for: the beginning of a
    trace may be quieter than the whole."""
    most = workload.num_requests
    if not 1 <= num_requests <= most:
        allowed = f"1 to {most}, as many as {workload.name} has"
        raise ConfigError(f"num_requests: got {num_requests}; allowed: {allowed}")
    if num_requests == most:
        return workload

    def requests() -> Iterator[Work]:
        return islice(workload.requests(), num_requests)

    rate = mean_rate([work.arrival_s for work in requests()]) if measure else workload.rate
    return replace(workload, requests=requests, num_requests=num_requests, rate=rate)


def mean_rate(arrivals_s: list[float]) -> float:
    """Requests per second between the first and the last; 0: they arrive at once."""
    span_s = arrivals_s[-1] - arrivals_s[0]
    return (len(arrivals_s) - 1) / span_s if span_s > 0 else 0.0


def _require_fits(workload: Workload, max_context: int) -> None:
    for work in workload.requests():
        if work.prompt_tokens + work.output_tokens > max_context:
            raise ConfigError(
                f"{workload.name}, request {work.number}: got {work.prompt_tokens} prompt and"
                f" {work.output_tokens} output tokens; allowed: {max_context} together, the"
                " model's context; try a smaller length_scale, or too_long=cut"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """What becomes of each request. Lengths are multiplied by `numerator` / `denominator`: in
    floats, a prompt could come out one token shorter than its blocks."""

    time_scale: float
    numerator: int
    denominator: int
    old_block_size: int
    most_prompt: int
    most_output: int
    max_tokens: int
    max_context: int | None
    cut: bool

    def __post_init__(self) -> None:
        _require_positive("time_scale", self.time_scale)
        scale = self.numerator / self.denominator
        _require_positive("length_scale", scale)
        if self.old_block_size * self.numerator % self.denominator:
            allowed = (
                f"a factor that keeps blocks of {self.old_block_size} tokens whole, such as"
                f" {1 / self.old_block_size:g} times a whole number"
            )
            raise ConfigError(f"length_scale: got {scale:g}; allowed: {allowed}")
        for name in ("most_prompt", "most_output", "max_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}; allowed: 0 or more")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"max_context: got {self.max_context}; allowed: 2 or more")

    @property
    def block_size(self) -> int:
        return self.old_block_size * self.numerator // self.denominator

    @property
    def only_fits(self) -> bool:
        """Times and lengths stay as they are, unless a request exceeds the context."""
        chosen = self.max_tokens or self.most_prompt or self.most_output
        return not chosen and self.numerator == self.denominator and self.time_scale == 1

    @property
    def nothing(self) -> bool:
        """Requests stay as they are."""
        return self.only_fits and self.max_context is None

    def longest(self, tokens: int) -> int:
        """A bound on prompt and output of any request, from the bound before the change."""
        if not tokens:
            return self.max_context if self.max_context and self.cut else 0
        # Prompt and output are rounded up each.
        longest = self._length(tokens) + (self.numerator != self.denominator)
        return min(longest, self.max_context) if self.max_context and self.cut else longest

    def described(self) -> dict[str, str]:
        said = {}
        if self.time_scale != 1:
            said["times multiplied by"] = f"{self.time_scale:g}"
        if self.numerator != self.denominator:
            said["lengths multiplied by"] = f"{self.numerator / self.denominator:g}"
        for kind, most in (("prompts", self.most_prompt), ("outputs", self.most_output)):
            if most:
                said[f"{kind} cut to"] = f"{most} tokens"
        if self.max_tokens:
            said["stated limit"] = f"{self.max_tokens} tokens"
        if self.max_context is not None and self.cut:
            said["cut to"] = f"{self.max_context} tokens"
        return said

    def _length(self, tokens: int) -> int:
        return -(-tokens * self.numerator // self.denominator)

    def apply(self, work: Work) -> Work:
        context = self.max_context
        most = work.prompt_tokens + work.max_tokens
        if self.only_fits and context is not None and most <= context:
            return work
        prompt = self._length(work.prompt_tokens)
        output = self._length(work.output_tokens)
        limit = self._length(work.max_tokens)
        if self.most_prompt:
            prompt = min(prompt, self.most_prompt)
        if self.most_output:
            output, limit = min(output, self.most_output), min(limit, self.most_output)
        limit = self.max_tokens or limit
        if context is not None:
            if self.cut and prompt + output > context:
                output = min(output, context // 2)
                prompt = min(prompt, context - output)
            # A server refuses a limit that does not fit behind the prompt.
            limit = min(limit, context - prompt)
        blocks = work.blocks
        if blocks:
            blocks = blocks[: -(-prompt // self.block_size)]
        return Work(
            number=work.number,
            arrival_s=work.arrival_s * self.time_scale,
            prompt_tokens=prompt,
            output_tokens=output,
            max_tokens=max(limit, output),
            client=work.client,
            weight=work.weight,
            blocks=blocks,
            session=work.session,
            priority=work.priority,
            deadline_s=work.deadline_s,
            abort_s=work.abort_s,
            think_s=None if work.think_s is None else work.think_s * self.time_scale,
        )
