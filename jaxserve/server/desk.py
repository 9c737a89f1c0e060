"""Where every request is handed in, whatever dialect it was spoken in: admitted, followed, closed.

Knows callers, requests and answers. Knows neither gRPC nor HTTP.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

from jaxserve.config import CacheConfig
from jaxserve.errors import BadRequest, JaxserveError, NotReady
from jaxserve.request import FinishReason
from jaxserve.server.answer import Answer
from jaxserve.server.clients import ClientLedger
from jaxserve.server.convert import submit_to_proto
from jaxserve.server.detokenize import CONTEXT_TOKENS
from jaxserve.server.identity import MAX_NAME_CHARS, Caller, Gate
from jaxserve.server.intake import Ask, Intake
from jaxserve.server.link import ReplicaLink
from jaxserve.server.metrics import RequestMetrics
from jaxserve.server.model_text import ModelText
from jaxserve.server.request_log import RequestLog, RequestRecord


class Desk:
    """Takes requests for one model of one replica. All methods belong to one event loop."""

    def __init__(
        self,
        link: ReplicaLink,
        text: ModelText,
        *,
        cache: CacheConfig,
        gate: Gate,
        request_log: RequestLog,
    ):
        self.link = link
        self.text = text
        self.gate = gate
        self.ledger = ClientLedger()
        self.metrics = RequestMetrics()
        self.draining = False
        self.num_requests = self.num_refused = 0
        self._cache = cache
        self._log = request_log
        self._live: dict[str, Answer] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.link.ready and not self.draining

    def intake(self, model: str = "") -> Intake:
        """Raises NotReady before the model is known, UnknownModel for another one."""
        intake = Intake(self.link.description, self.text, self._cache)
        intake.check_model(model)
        return intake

    # --------------------------------------------------------------------------- requests

    @contextmanager
    def reading(self, *, method: str, peer: str) -> Iterator[None]:
        """Log and count what is refused while it is read, before it is a request."""
        try:
            yield
        except JaxserveError as error:
            record = RequestRecord(request_id="", method=method, model="", peer=peer)
            record.code, record.error = error.grpc_code, str(error)
            self.num_requests += 1
            self.num_refused += 1
            self.metrics.refused(record)
            self._log.write(record)
            raise

    @asynccontextmanager
    async def answering(
        self,
        ask: Ask,
        headers: Mapping[str, str],
        *,
        method: str,
        peer: str,
        once: bool,
        deadline_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        """A request from intake to its log line; whatever way it ends, the engine is told.

        `headers` with lower-case names say who calls, `deadline_s` is on the monotonic clock.
        Raises what is wrong with the request, before and while it is answered.
        """
        arrived_s = time.monotonic()
        record = RequestRecord(
            request_id=ask.request_id[:MAX_NAME_CHARS],  # not judged yet
            method=method,
            model=ask.model[:MAX_NAME_CHARS],
            peer=peer,
        )
        caller: Caller | None = None
        answer: Answer | None = None
        self.num_requests += 1
        try:
            caller = self.gate.identify(headers, claimed=ask.client)
            record.client, record.trusted = caller.client, caller.trusted
            answer = await self._admit(ask, caller, once=once, deadline_s=deadline_s)
            yield answer
        except asyncio.CancelledError:
            record.code = "DEADLINE_EXCEEDED" if _is_late(deadline_s) else "CANCELLED"
            raise
        except JaxserveError as error:
            record.code, record.error = error.grpc_code, str(error)
            self.num_refused += answer is None
            raise
        except Exception as error:
            record.code, record.error = "INTERNAL", type(error).__name__
            raise
        finally:
            record.total_s = round(time.monotonic() - arrived_s, 6)
            if answer is None:
                self.metrics.refused(record)
            else:
                self._close(answer, late=_is_late(deadline_s))
                _describe(answer, record, arrived_s)
                self.metrics.ended(record, answer)
            if caller is not None:
                self._count(caller, record)
            self._log.write(record)

    def abort(
        self, request_ids: Sequence[str], caller: Caller
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """End live requests by id: those ended, and those that the caller has not.

        With API keys a caller ends none but its own.
        """
        aborted, unknown = [], []
        for request_id in request_ids:
            answer = self._live.get(request_id)
            foreign = answer is not None and answer.request.client != caller.client
            if answer is None or answer.done or (foreign and self.gate.has_keys):
                unknown.append(request_id)
            else:
                self.link.abort(request_id, reason=FinishReason.ABORT)
                self.link.release(request_id)
                answer.end(FinishReason.ABORT)
                aborted.append(request_id)
        return tuple(aborted), tuple(unknown)

    async def _admit(
        self, ask: Ask, caller: Caller, *, once: bool, deadline_s: float | None
    ) -> Answer:
        if self.draining:
            raise NotReady("the server is draining; send the request elsewhere")
        intake = self.intake()
        request = await intake.make_request(ask, caller)
        if request.request_id in self._live:
            raise BadRequest("request_id", request.request_id, "an id that no live request has")
        tokenizer = self.text.tokenizer if intake.wants_text(ask) else None
        context_ids = request.prompt[-CONTEXT_TOKENS:].tolist()
        answer = Answer(
            request,
            self.link,
            make_detokenizer=(
                None if tokenizer is None else lambda: tokenizer.detokenizer(context_ids)
            ),
            token_text=str if tokenizer is None else tokenizer.token_text,
            once=once,
            observer=self.metrics,
        )
        self.link.submit(submit_to_proto(request), answer, deadline_s=deadline_s)
        self._live[request.request_id] = answer
        self._idle.clear()
        return answer

    def _close(self, answer: Answer, *, late: bool) -> None:
        request_id = answer.request.request_id
        del self._live[request_id]
        if not self._live:
            self._idle.set()
        if not answer.complete:
            reason = FinishReason.DEADLINE if late else FinishReason.ABORT
            self.link.abort(request_id, reason=reason)
        self.link.release(request_id)

    def _count(self, caller: Caller, record: RequestRecord) -> None:
        counts = self.ledger.of(caller)
        counts.num_requests += 1
        counts.prompt_tokens += record.prompt_tokens
        counts.cached_tokens += record.cached_tokens
        counts.completion_tokens += record.completion_tokens

    # --------------------------------------------------------------------------- draining

    @property
    def num_live(self) -> int:
        """Requests that are being answered."""
        return len(self._live)

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    def end_rest(self, error: JaxserveError) -> None:
        """End every request that is still being answered."""
        for answer in list(self._live.values()):
            answer.on_failure(error)


def _is_late(deadline_s: float | None) -> bool:
    return deadline_s is not None and time.monotonic() >= deadline_s


def _describe(answer: Answer, record: RequestRecord, arrived_s: float) -> None:
    usage = answer.usage
    record.request_id = answer.request.request_id
    record.samples = answer.request.params.n
    record.prompt_tokens = usage.prompt_tokens
    record.cached_tokens = usage.cached_tokens
    record.completion_tokens = usage.completion_tokens
    record.finish = answer.finish_reasons
    if answer.first_token_at_s is not None:
        record.first_token_s = round(answer.first_token_at_s - arrived_s, 6)
