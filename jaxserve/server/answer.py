"""One request's answer on its way from deltas to messages: text, stop strings, counts, the end.

Knows tokens and messages. Knows no socket and no RPC: deltas come in by a call, and whoever writes
the answer waits with `next_messages`. Deltas that come while a write is under way join one message
per sample, so a slow reader costs memory for text, never a queue of messages.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, runtime_checkable

from jaxserve.errors import DeadlinePassed, InternalError, JaxserveError
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.convert import REASON_FROM_PROTO, REASON_TO_PROTO
from jaxserve.request import FinishReason, Request
from jaxserve.server.detokenize import Detokenizer
from jaxserve.server.stop_strings import Match, StopMatcher

PENDING_STEPS: Final = 4
"""Steps a row may run per slice while its text ends in the beginning of a stop string."""


@runtime_checkable
class RowControl(Protocol):
    """What an answer asks of the engine; `ReplicaLink` is one."""

    def abort(
        self, request_id: str, *, sample: int, reason: FinishReason, keep_tokens: int | None
    ) -> None: ...

    def limit_row(self, request_id: str, *, sample: int, max_steps: int) -> None: ...


@runtime_checkable
class DeliveryObserver(Protocol):
    """Hears of tokens as they come in; `RequestMetrics` is one."""

    def on_tokens(self, count: int, gap_s: float | None) -> None:
        """`count` tokens of one sample came, `gap_s` after those before (None: its first)."""
        ...


class _Sample:
    """One of a request's n continuations."""

    def __init__(self, answer: "Answer", index: int, detokenizer: Detokenizer | None):
        params = answer.request.params
        self._answer = answer
        self._index = index
        self._detokenizer = detokenizer
        self._stops = StopMatcher(params.stop) if params.stop else None
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._limited = False
        self.num_tokens = 0
        self.tokens_at_s: float | None = None
        self.finish: FinishReason | None = None
        self.pending: pb.GenerateResponse | None = None

    def take(self, delta: pb.RowDelta) -> None:
        """Add one slice's tokens; what comes after the end (a stop string's overrun) is dropped."""
        if self.finish is not None:
            return
        ids: list[int] = list(delta.token_ids)
        text, match = "", None
        if self._detokenizer is not None:
            stopped = delta.HasField("stop_token_id")
            text, match, num_kept = self._decode(ids[:-1] if stopped else ids)
            if match is not None:
                del ids[num_kept:]
            elif delta.finish:
                text, match = self._decode_rest(text, self.num_tokens + len(ids))
            if match is not None and self._include_stop:
                text += match.stop
            elif stopped and match is None and self._include_stop:
                text += self._answer.token_text(delta.stop_token_id)
        self.num_tokens += len(ids)
        message = self._add(text, ids)
        if delta.logprobs:
            self._add_logprobs(message, delta.logprobs[: len(ids)])
        if match is not None:
            self._end(message, FinishReason.STOP).stop_string = match.stop
            if not delta.finish:
                self._answer.control.abort(
                    self._answer.request.request_id,
                    sample=self._index,
                    reason=FinishReason.STOP,
                    keep_tokens=self.num_tokens,
                )
        elif delta.finish:
            reason = REASON_FROM_PROTO[delta.finish]
            assert reason is not None
            finish = self._end(message, reason)
            finish.message = delta.message
            if delta.HasField("stop_token_id"):
                finish.stop_token_id = delta.stop_token_id
        elif self._stops is not None:
            self._limit(self._stops.num_held > 0)

    def end(self, reason: FinishReason) -> None:
        """End it from this side: the text held back comes out, the engine is told by the caller."""
        if self.finish is None:
            text = self._decode_rest("", 0)[0] if self._detokenizer is not None else ""
            self._end(self._add(text, []), reason)

    def _decode(self, ids: Sequence[int]) -> tuple[str, Match | None, int]:
        """Certain text of `ids`, a match, and how many of `ids` there are up to its last one."""
        assert self._detokenizer is not None
        if self._stops is None:
            return self._detokenizer.feed(ids), None, len(ids)
        # A stop string counts once more than min_tokens tokens are out, as a stop token does.
        num_unarmed = min(len(ids), max(0, self._min_tokens - self.num_tokens))
        head = ""
        if num_unarmed:
            head, _ = self._stops.feed(self._detokenizer.feed(ids[:num_unarmed]), armed=False)
        armed = ids[num_unarmed:]
        before = self._detokenizer.save()
        tail, match = self._stops.feed(self._detokenizer.feed(armed))
        num_kept = len(ids)
        if match is not None:
            self._detokenizer.restore(before)
            num_kept = num_unarmed + _tokens_up_to(match.end, armed, self._detokenizer)
        return head + tail, match, num_kept

    def _decode_rest(self, text: str, num_tokens: int) -> tuple[str, Match | None]:
        """`text` and what was held back: `num_tokens` is all there will be."""
        assert self._detokenizer is not None
        rest = self._detokenizer.flush()
        if self._stops is None:
            return text + rest, None
        certain, match = self._stops.feed(rest, armed=num_tokens > self._min_tokens)
        return text + certain + self._stops.flush(), match

    def _add(self, text: str, ids: list[int]) -> pb.GenerateResponse:
        message = self.pending
        if message is None:
            self.pending = message = pb.GenerateResponse(
                request_id=self._answer.request.request_id,
                sample=self._index,
                text=text,
                token_ids=ids,
            )
        else:
            message.text += text
            message.token_ids.extend(ids)
        return message

    def _add_logprobs(
        self, message: pb.GenerateResponse, logprobs: Sequence[pb.TokenLogprob]
    ) -> None:
        if self._detokenizer is not None:
            for logprob in logprobs:
                self._answer.add_texts(logprob)
        message.logprobs.extend(logprobs)

    def _end(self, message: pb.GenerateResponse, reason: FinishReason) -> pb.Finish:
        self.finish = reason
        message.finish.reason = REASON_TO_PROTO[reason]
        return message.finish

    def _limit(self, wanted: bool) -> None:
        if wanted is not self._limited:
            self._limited = wanted
            self._answer.control.limit_row(
                self._answer.request.request_id,
                sample=self._index,
                max_steps=PENDING_STEPS if wanted else 0,
            )


def _tokens_up_to(num_characters: int, ids: Sequence[int], detokenizer: Detokenizer) -> int:
    """How many of `ids` it takes until the text has `num_characters` characters."""
    for count, token in enumerate(ids, 1):
        num_characters -= len(detokenizer.feed([token]))
        if num_characters <= 0:
            return count
    return len(ids)


class Answer:
    """Collects one request's deltas. `make_detokenizer` None: the answer is token ids only.

    With `once` the writer is woken at the end alone and gets everything as one message per sample.
    """

    def __init__(
        self,
        request: Request,
        control: RowControl,
        *,
        make_detokenizer: Callable[[], Detokenizer] | None,
        token_text: Callable[[int], str],
        once: bool,
        observer: DeliveryObserver | None = None,
    ):
        self.request = request
        self.control = control
        self.token_text = token_text
        self.error: JaxserveError | None = None
        self.first_token_at_s: float | None = None
        self.cached_tokens = 0
        self._make_detokenizer = make_detokenizer
        self._once = once
        self._observer = observer
        self._seen = False  # whether the client got any of it
        self._waiter: asyncio.Future[None] | None = None
        self._start()

    @property
    def done(self) -> bool:
        """Whether every sample ended, or the request failed."""
        return self.error is not None or self._num_open == 0

    @property
    def complete(self) -> bool:
        """Whether every sample ended, so that the engine need not be told."""
        return self._num_open == 0

    @property
    def usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=self.request.prompt.size,
            cached_tokens=self.cached_tokens,
            completion_tokens=sum(sample.num_tokens for sample in self._samples),
        )

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        return tuple(sample.finish.value for sample in self._samples if sample.finish is not None)

    # -------------------------------------------------------------------------- from the link

    def on_delta(self, delta: pb.RowDelta) -> None:
        """Receiver: one slice's tokens for one sample."""
        sample = self._samples[delta.sample]
        was_open = sample.finish is None
        if delta.token_ids and self.first_token_at_s is None:
            self.first_token_at_s = time.monotonic()
        self.cached_tokens = delta.cached_tokens or self.cached_tokens
        num_before = sample.num_tokens
        sample.take(delta)
        if self._observer is not None and sample.num_tokens > num_before:
            self._note_tokens(self._observer, sample, sample.num_tokens - num_before)
        if delta.prompt_logprobs and sample.pending is not None:
            if self._make_detokenizer is not None:
                for place in delta.prompt_logprobs:
                    if place.HasField("value"):
                        self.add_texts(place.value)
            sample.pending.prompt_logprobs.extend(delta.prompt_logprobs)
        if was_open and sample.finish is not None:
            self._num_open -= 1
            self._note_bad_end(sample.finish, delta.message)
        if not self._once or self.done:
            self._wake()

    def on_failure(self, error: JaxserveError) -> None:
        """Receiver: nothing more will come. What was taken in is still written first."""
        if not self.done:
            self.error = error
            self._wake()

    def try_restart(self) -> bool:
        """Receiver: begin again if the client has seen nothing."""
        if self._seen or self.done:
            return False
        self._start()
        return True

    # -------------------------------------------------------------------------- for the writer

    def end(self, reason: FinishReason) -> None:
        """End every open sample from this side."""
        if not self.done:
            for sample in self._samples:
                sample.end(reason)
            self._num_open = 0
            self._wake()

    async def next_messages(self) -> list[pb.GenerateResponse]:
        """What came since the last call, one message per sample; empty once all was given out.

        Raises the request's error after the messages that came before it.
        """
        while True:
            messages = [] if self._once and not self.done else self._take_pending()
            if messages:
                return messages
            if self.error is not None:
                raise self.error
            if self.done:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _take_pending(self) -> list[pb.GenerateResponse]:
        messages = []
        for sample in self._samples:
            if sample.pending is not None:
                messages.append(sample.pending)
                sample.pending = None
        if messages:
            self._seen = True
            if self._num_open == 0:
                messages[-1].usage.CopyFrom(self.usage)
        return messages

    def add_texts(self, logprob: pb.TokenLogprob) -> None:
        """Write the tokens' texts into a log-probability message."""
        logprob.text = self.token_text(logprob.token_id)
        for top in logprob.top:
            top.text = self.token_text(top.token_id)

    def _start(self) -> None:
        make = self._make_detokenizer
        self._samples = [
            _Sample(self, index, make() if make is not None else None)
            for index in range(self.request.params.n)
        ]
        self._num_open = len(self._samples)

    @staticmethod
    def _note_tokens(observer: DeliveryObserver, sample: _Sample, count: int) -> None:
        before_s, sample.tokens_at_s = sample.tokens_at_s, time.monotonic()
        observer.on_tokens(count, None if before_s is None else sample.tokens_at_s - before_s)

    def _note_bad_end(self, reason: FinishReason, message: str) -> None:
        if reason is FinishReason.DEADLINE:
            self.error = DeadlinePassed(message or "the request's deadline passed")
        elif reason is FinishReason.ERROR:
            self.error = InternalError(message or "the engine failed", error_id="engine")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
