"""The engine core: requests in, slice plans out; slice results in, tokens out. No I/O, no clock.

The driver (or the simulator) calls `next_slice` and `complete` around the device. With overlap,
slice k + 1 is planned before slice k was parsed: a row of k whose end the host does not know yet is
*draining*, planned again, and masked by the device if it ended. What may be wrong about such a row
is only how long it is, so its lease always covers the most it can have.
"""

import heapq
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

from jaxserve.engine.admitter import Admitter
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.plan import Code, SlicePlan, SliceResult
from jaxserve.engine.planner import Flight, Planner
from jaxserve.engine.prefixes import OutputKeys, Prefixes
from jaxserve.engine.sequence import Job, Phase, Sequence
from jaxserve.engine.statistics import Compiles, EngineStatistics
from jaxserve.errors import BadRequest, DeadlinePassed, JaxserveError, QueueFull
from jaxserve.request import (
    Delta,
    FinishReason,
    Request,
    TokenLogprob,
    check_request,
)
from jaxserve.schedulers.admission import Candidate, RunningRows
from jaxserve.schedulers.catalog import make_admission, make_order, victim_key
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.events import Abort, Arrive, Enact, Finish, Preempt, Ran
from jaxserve.schedulers.order import Order, Refuses
from jaxserve.schedulers.pages import PagePool
from jaxserve.schedulers.service_meter import ServiceMeter


@dataclass(frozen=True, slots=True)
class Rejection:
    """A request that was refused, and why."""

    request_id: str
    error: JaxserveError


_REASONS: dict[int, FinishReason] = {
    Code.STOP: FinishReason.STOP,
    Code.LENGTH: FinishReason.LENGTH,
    Code.ERROR: FinishReason.ERROR,
}


class EngineCore:
    """Jobs, pages and policies of one replica. One thread owns it.

    Everything is driven by the caller's time `now_s`, in seconds, which never goes back. What
    `compiles` says of the executor is part of the statistics. `output_keys` names pages of output
    (see `Prefixes`).
    """

    def __init__(
        self,
        config: CoreConfig,
        *,
        compiles: Callable[[], Compiles] = Compiles,
        output_keys: OutputKeys | None = None,
    ):
        self.config = config
        self._compiles = compiles
        scheduler = config.scheduler
        order = make_order(scheduler.order, scheduler.order_options, page_size=config.page_size)
        self._refuses = order.refuses if isinstance(order, Refuses) else None
        self.meter = ServiceMeter(order)
        self.order: Order = self.meter  # counts what each client is served, and hands events on
        self.admission = make_admission(scheduler.admission, scheduler.admission_options)
        self.slicing = scheduler.make_slicing(
            max_context=config.limits.max_context, dispatch_s=config.dispatch_s
        )
        self.victim_key = victim_key(scheduler.victim)
        # What the cache holds is nothing to the meter.
        self.pool = PagePool(config.num_pages, config.page_size, on_cache_change=order.on)
        self.jobs: dict[int, Job] = {}
        self._number_of: dict[str, int] = {}
        self._last_job = 0
        self._in_flight: deque[Flight] = deque()
        self._last_slice = 0
        self._depth = 1
        self._fits = (0, 0)  # tokens and output tokens of a request that would
        self._expiries: list[tuple[float, int, bool]] = []
        self._outbox: list[Delta] = []
        self.statistics_now = EngineStatistics(page_size=config.page_size)
        self.prefixes = Prefixes(config, self.pool, output_keys)
        self._admitter = Admitter(self)
        self._planner = Planner(self, self._admitter)

    # Requests in.

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request.

        Raises BadRequest for fields that cannot be served, also when the pool could never hold it,
        QueueFull when the bounded queue has no place, and DeadlinePassed when the order sees that
        its deadline cannot be met.
        """
        check_request(request, self.config.limits)
        if request.params.prompt_logprobs is not None:
            raise BadRequest(
                "prompt_logprobs",
                request.params.prompt_logprobs,
                "absent: this version computes log-probabilities of output tokens only",
            )
        if request.request_id in self._number_of:
            raise BadRequest("request_id", request.request_id, "an id that is not in use")
        room = self.config.limits.max_context - request.prompt.size
        max_output = request.params.max_tokens or room
        self._check_fits(request, max_output)
        self._check_queue(request, now_s)
        keys = self.prefixes.lookup_keys(request)
        job = Job(self._last_job + 1, request, max_output, now_s, keys)
        job.sequences = [
            Sequence(job, sample, sample_seed(request.params.seed or 0, sample))
            for sample in range(request.params.n)
        ]
        arrival = self._arrival(job)
        self._check_order(arrival)
        self._last_job = job.number
        self.jobs[job.number] = job
        self._number_of[request.request_id] = job.number
        self.statistics_now.waiting += 1
        self.statistics_now.waiting_tokens += request.prompt.size
        self.statistics_now.received += 1
        self.order.on(arrival)
        self.slicing.arrived(now_s)
        if request.deadline_s is not None:
            heapq.heappush(self._expiries, (request.deadline_s, job.number, True))
        timeout_s = self.config.scheduler.queue_timeout_s
        if timeout_s:
            heapq.heappush(self._expiries, (now_s + timeout_s, job.number, False))
        if len(self._expiries) > 4 * len(self.jobs) + 1000:  # most are of requests that ended
            self._expiries = [each for each in self._expiries if each[1] in self.jobs]
            heapq.heapify(self._expiries)

    def abort(
        self,
        request_id: str,
        *,
        sample: int = -1,
        reason: FinishReason = FinishReason.ABORT,
        keep_tokens: int | None = None,
    ) -> bool:
        """End a request, or one sample of it, from outside. False when it is not known (any more).

        With `keep_tokens`, output beyond so many tokens never counted: a stop string matched there.
        Its pages are handed on once every slice dispatched before is parsed.
        """
        job = self.jobs.get(self._number_of.get(request_id, -1))
        if job is None:
            return False
        ended = [each for each in job.sequences if sample in (-1, each.sample)]
        for sequence in ended:
            if keep_tokens is not None:
                self._take_back(sequence, keep_tokens)
            if reason is FinishReason.STOP:
                self.admission.finished(job.request.client, len(sequence.made))
            self._end(sequence, reason, event=Abort)
        return bool(ended)

    def _take_back(self, sequence: Sequence, keep_tokens: int) -> None:
        """Output behind a stop string never counted: nobody is charged for it. (But whoever was
        preempted since stays charged: policies hear of tokens of running requests alone.)"""
        overrun = len(sequence.made) - keep_tokens
        if overrun <= 0:
            return
        sequence.keep(keep_tokens)
        self.statistics_now.output_tokens -= overrun
        if sequence.job.running:
            self.order.on(Enact([(sequence.job.number, 0, -overrun)]))

    def limit_row(self, request_id: str, sample: int, max_steps: int) -> None:
        """Let a sample run at most `max_steps` steps per slice (0: as many as the slice has)."""
        job = self.jobs.get(self._number_of.get(request_id, -1))
        for sequence in job.sequences if job else ():
            if sequence.sample == sample:
                sequence.step_limit = max_steps

    # Slices out, results in.

    def next_slice(self, now_s: float) -> SlicePlan | None:
        """The next slice to dispatch; None when there is nothing to run, or enough in flight."""
        if self._expiries and self._expiries[0][0] <= now_s:
            self._expire(now_s)
        if len(self._in_flight) >= self._depth:
            return None
        while (planned := self._planner.plan(self._last_slice + 1, now_s)) is None:
            if not self._planner.break_stall():
                return None
        plan, flight, self._depth = planned
        self._last_slice = plan.number
        self._in_flight.append(flight)
        self.statistics_now.slices += 1
        self.statistics_now.prefill_tokens += plan.num_prefill_tokens
        return plan

    def complete(self, result: SliceResult, now_s: float) -> None:
        """Take note of a slice's result; slices complete in the order of their numbers."""
        flight = self._in_flight.popleft()
        if flight.number != result.number:
            raise RuntimeError(f"slice {result.number} completed, {flight.number} was expected")
        self.pool.parsed(result.number)
        statistics, made_before = self.statistics_now, self.statistics_now.output_tokens
        attended = sum([row.length for row in flight.rows]) * result.steps_run
        ended = self._take_in(flight, result, now_s)
        prompts = flight.steps.count(0)  # chunks that do not end their prompt
        shape = SliceShape(result.steps_run, result.rows_run, attended, result.prefill_run)
        made = statistics.output_tokens - made_before
        self.slicing.ran(
            shape, slice_s=result.slice_s, host_s=result.host_s, made=made, finished=ended
        )
        self.admission.ticked(result.steps_run)
        row_steps = result.steps_run * len(flight.rows)
        statistics.steps += result.steps_run
        statistics.row_steps += row_steps
        statistics.slice_idle_row_steps += row_steps - made - prompts
        statistics.slice_s += result.slice_s
        statistics.host_s += result.host_s
        statistics.slice_steps.observe(result.steps_run)
        statistics.slice_seconds.observe(result.slice_s)
        statistics.scheduling_seconds.observe(result.host_s)

    def take_deltas(self) -> list[Delta]:
        """What became known since the last call."""
        deltas, self._outbox = self._outbox, []
        return deltas

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        """Requests that have rows."""
        return sum([job.running for job in self.jobs.values()])

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight."""
        return not self.jobs and not self._in_flight

    def next_expiry_s(self) -> float | None:
        """When `next_slice` should be called even if nothing else happens."""
        return self._expiries[0][0] if self._expiries else None

    # Endings.

    def _take_in(self, flight: Flight, result: SliceResult, now_s: float) -> int:
        """Tokens go to their sequences, then policies hear of them, then ends are ends. How many
        rows ended on the device."""
        tokens, codes, has_logprobs = result.tokens, result.codes, result.logprobs is not None
        ran: list[Ran] = []
        num_made = 0
        ending: list[tuple[Sequence, int]] = []
        done, evicting, outbox = Phase.DONE, Phase.EVICTING, self._outbox
        rows = zip(flight.rows, flight.steps, tokens, codes, strict=True)
        for place, (row, steps, made, code) in enumerate(rows):
            row.ahead -= steps
            phase = row.phase
            if phase is done:
                continue
            ends = code or phase is evicting
            if made:
                job, count = row.job, len(made)
                row.made += made
                row.length += count
                num_made += count
                ran.append((job.number, 0, count))
                if job.first_token_s is None:
                    self._note_first_token(job, now_s)
                if not ends:  # as `_emit`, without its cases
                    job.announced = True
                    request = job.request
                    logprobs = _logprobs(row, made, result, place) if has_logprobs else ()
                    size, cached = request.prompt.size, job.cached_tokens
                    outbox.append(
                        Delta(request.request_id, row.sample, made, size, cached, logprobs)
                    )
            if ends:
                ending.append((row, place))
        if ran:
            self.statistics_now.output_tokens += num_made
            self.order.on(Enact(ran))
        for row, place in ending:
            self._leave_slice(row, tokens[place], result, place, now_s)
        return len(codes) - codes.count(Code.RUNNING)

    def _note_first_token(self, job: Job, now_s: float) -> None:
        assert job.admitted_s is not None
        job.first_token_s = now_s
        self.statistics_now.request_prefill_time_seconds.observe(now_s - job.admitted_s)

    def _leave_slice(
        self, row: Sequence, tokens: list[int], result: SliceResult, place: int, now_s: float
    ) -> None:
        """Of a row that ended, or that is preempted once its last slice is parsed."""
        job, code = row.job, result.codes[place]
        if code != Code.RUNNING:
            if code != Code.ERROR:
                self.admission.finished(job.request.client, len(row.made))
            self._emit(row, tokens, _logprobs(row, tokens, result, place), _REASONS[code])
            self._end(row, None, event=Finish)
            if not job.sequences and job.first_token_s is not None:
                decode_s = now_s - job.first_token_s
                self.statistics_now.request_decode_time_seconds.observe(decode_s)
            return
        if tokens:
            self._emit(row, tokens, _logprobs(row, tokens, result, place))
        if row.last_slice == result.number:
            self._evict(row)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason | None,
        *,
        event: type[Finish] | type[Abort],
        message: str = "",
    ) -> None:
        """Take a sequence out; with a reason, say so in a last delta without tokens."""
        job = sequence.job
        if reason is not None:
            self._emit(sequence, (), finish=reason, message=message)
            self.statistics_now.aborted += reason is not FinishReason.STOP
        self._release(sequence)
        sequence.phase = Phase.DONE
        job.sequences.remove(sequence)
        if job.sequences:
            self._requeue_if_evicted(job)
            return
        if job.parent is not None:
            self._release(job.parent)
            job.parent.phase = Phase.DONE
            job.parent = None  # or the two would keep each other
        if not job.running:
            self.statistics_now.waiting -= 1
            self.statistics_now.waiting_tokens -= job.request.prompt.size
        del self.jobs[job.number], self._number_of[job.request.request_id]
        self.statistics_now.finished += event is Finish
        self.order.on(event(job.number))

    def outgrown(self, job: Job) -> None:
        """A request that has the pool to itself and cannot go on ends, saying why."""
        message = f"the KV pool of {self.pool.num_pages} pages is too small for this request alone"
        for sequence in list(job.sequences):
            self._end(sequence, FinishReason.LENGTH, event=Finish, message=message)

    def preempt(self, job: Job) -> None:
        """Take a running job's rows away at this slice boundary; it waits and is recomputed."""
        assert job.running and all(row.phase is not Phase.EVICTING for row in job.rows()), job
        self.statistics_now.preemptions += 1
        flying = {flight.number for flight in self._in_flight}
        for sequence in job.rows():
            sequence.phase = Phase.EVICTING
            if sequence.last_slice not in flying:
                self._evict(sequence)
        running = [self.jobs[number] for number in self.order.running()]
        self.admission.retracted(self._admitter.running_rows(running))

    def _evict(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.phase = Phase.WAITING
        sequence.computed, sequence.started = 0, False
        self._requeue_if_evicted(sequence.job)

    def _requeue_if_evicted(self, job: Job) -> None:
        if job.running and all(row.phase is Phase.WAITING for row in job.rows()):
            job.running, job.parent = False, None
            self.statistics_now.waiting += 1
            self.statistics_now.waiting_tokens += job.request.prompt.size
            self.order.on(Preempt(job.number, self.prefixes.num_cached(job)))

    def _release(self, sequence: Sequence) -> None:
        """Give back lease and slot; what was computed and is valid stays findable."""
        if sequence.lease is not None:
            self.prefixes.remember(sequence)
            self.pool.release(sequence.lease)
            sequence.lease = None
        self._admitter.give_slot(sequence)

    def _expire(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] <= now_s:
            _, number, is_deadline = heapq.heappop(self._expiries)
            job = self.jobs.get(number)
            if job is None or not (is_deadline or self._never_ran(job)):
                continue
            what = "deadline" if is_deadline else "queue time-out (--queue_timeout_s)"
            for sequence in list(job.sequences):
                message = f"{what} passed after {now_s - job.request.arrived_s:.3f} s"
                self._end(sequence, FinishReason.DEADLINE, event=Abort, message=message)

    @staticmethod
    def _never_ran(job: Job) -> bool:
        return not job.running and not job.announced

    # Checks and reports.

    def _arrival(self, job: Job) -> Arrive:
        request, num_cached = job.request, self.prefixes.num_cached(job)
        service_s = 0.0
        if request.deadline_s is not None:
            uncached = request.prompt.size - num_cached * self.config.page_size
            rows, steps = request.params.n, max(1, request.params.min_tokens)
            attended = rows * (steps * request.prompt.size + steps * (steps + 1) // 2)
            service_s = self.slicing.predict_s(SliceShape(steps, rows, attended, uncached))
        return Arrive(
            number=job.number,
            client=request.client,
            priority=request.priority,
            arrived_s=job.arrived_s,
            num_prompt_tokens=request.prompt.size,
            max_output=job.max_output,
            num_samples=request.params.n,
            weight=request.weight,
            page_keys=job.page_keys,
            num_cached=num_cached,
            deadline_s=request.deadline_s,
            service_s=service_s,
        )

    def _check_order(self, arrival: Arrive) -> None:
        why = self._refuses(arrival) if self._refuses else None
        if why is not None:
            self.statistics_now.refused += 1
            raise DeadlinePassed(why)

    def _check_fits(self, request: Request, max_output: int) -> None:
        tokens, samples = request.prompt.size, request.params.n
        if samples == 1:
            # For single samples rules are monotone: what is no larger in any way than something
            # that fits fits too. Several share whole pages: a longer prompt may cost less.
            known_tokens, known_output = self._fits
            if tokens <= known_tokens and max_output <= known_output:
                return
            both = max(tokens, known_tokens), max(max_output, known_output)
            if self._pool_holds(*both):
                self._fits = both
                return
        if not self._pool_holds(tokens, max_output, samples):
            got = f"{tokens} tokens, {samples} x {max_output} to make"
            capacity = self.pool.num_pages * self.pool.page_size
            allowed = (
                f"what the KV pool of {capacity} tokens can hold under admission rule"
                f" {self.config.scheduler.admission!r}"
            )
            raise BadRequest("prompt and max_tokens", got, allowed)

    def _pool_holds(self, tokens: int, max_output: int, samples: int = 1) -> bool:
        """Whether a request that has the pool to itself would be let in."""
        candidate = Candidate(tokens, self.pool.pages_for(tokens), max_output, samples)
        memory = self._admitter.memory(self.pool.num_pages, self.slicing.max_steps)
        return self.admission.admits(candidate, RunningRows(), memory)

    def _check_queue(self, request: Request, now_s: float) -> None:
        scheduler, now = self.config.scheduler, self.statistics_now
        if now.waiting >= scheduler.max_waiting:
            what = f"{now.waiting} requests wait (--max_waiting={scheduler.max_waiting})"
        elif now.waiting_tokens + request.prompt.size > scheduler.max_waiting_tokens:
            most = scheduler.max_waiting_tokens
            what = f"{now.waiting_tokens} prompt tokens wait (--max_waiting_tokens={most})"
        else:
            return
        self.statistics_now.refused += 1
        raise QueueFull(what, retry_after_s=self._admitter.drain_time_s(now_s))

    def _emit(
        self,
        sequence: Sequence,
        tokens: ReadOnly[int],
        logprobs: tuple[TokenLogprob, ...] = (),
        finish: FinishReason | None = None,
        message: str = "",
    ) -> None:
        job = sequence.job
        if tokens:
            job.announced = True
        self._outbox.append(
            Delta(
                request_id=job.request.request_id,
                sample=sequence.sample,
                tokens=tokens,
                logprobs=logprobs,
                finish=finish,
                stop_match=tokens[-1] if finish is FinishReason.STOP and tokens else None,
                prompt_tokens=job.request.prompt.size,
                cached_tokens=job.cached_tokens,
                message=message,
            )
        )

    def statistics(self) -> EngineStatistics:
        """Counters since the start, and gauges of now."""
        return self.statistics_now.snapshot(
            running=self.num_running,
            compiles=self._compiles(),
            pool=self.pool.statistics(),
            prefix=self.pool.tree.statistics(),
        )


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one sample, uint32: the request's own for the first, spread for the others."""
    mixed = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return (mixed + sample * 0x9E3779B9) & 0xFFFFFFFF


def _logprobs(
    sequence: Sequence, tokens: ReadOnly[int], result: SliceResult, place: int
) -> tuple[TokenLogprob, ...]:
    if result.logprobs is None:
        return ()
    wanted = sequence.job.request.params.logprobs
    if wanted is None:
        return ()
    chosen = result.logprobs.chosen[: len(tokens), place].tolist()
    ids = result.logprobs.top_ids[: len(tokens), place, :wanted].tolist()
    top = result.logprobs.top[: len(tokens), place, :wanted].tolist()
    return tuple(
        TokenLogprob(token, logprob, tuple(zip(row_ids, row, strict=True)))
        for token, logprob, row_ids, row in zip(tokens, chosen, ids, top, strict=True)
    )
