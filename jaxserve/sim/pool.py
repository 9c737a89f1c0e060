"""A pool of requests over instances, planned as a whole (SLS, SCLS), on a virtual clock.

A workload's feed fills the pool; a planner of `schedulers/pool/` cuts it into batches; each
instance runs its batches in order on a modelled device. Planners never see how much a request will
make. Aborts and deadlines take a request out of the pool at once; a batch that it is in runs on.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from jaxserve.engine.buckets import Buckets
from jaxserve.errors import ConfigError
from jaxserve.report.recorder import Recorder
from jaxserve.schedulers.estimators.bilinear import BilinearTime
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.slice_time import SliceTime
from jaxserve.schedulers.pool.catalog import POOLS, make_pool
from jaxserve.schedulers.pool.planner import Planner, PoolSetup
from jaxserve.schedulers.pool.request import Batch, PoolRequest, Ran
from jaxserve.sim.padded_static import PaddedTime, padded_static
from jaxserve.sim.pool_executors import BatchRun, Row, continuous_slice
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work

Tick = Callable[[int, float], None]
"""Is told how many requests have ended, and the virtual time in seconds."""

_RAN: Final = 0
_GONE: Final = 1
"""Kinds of events, in the order in which they are taken at one moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """A fleet under a pool planner.

    `pool` and `pool_options` name the planner (`jaxserve policies`). `memory` is the KV memory of
    each of `replicas` instances. `estimate` is what planners plan by; `padded_time` what a padded
    batch really takes (None: the estimate), `slice_time` a slice of a continuous engine, which
    `scls_resident` needs, padded to `buckets` (None: not at all).
    """

    memory: KvMemory
    estimate: BilinearTime
    pool: str = "scls"
    pool_options: tuple[str, ...] = ()
    replicas: int = 8
    padded_time: PaddedTime | None = None
    slice_time: SliceTime | None = None
    slice_len: int = 128
    max_rows: int = 512
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("replicas", 1, 10_000),
            ("slice_len", 1, 1 << 20),
            ("max_rows", 1, 1 << 20),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{name}: got {value!r}; allowed: {least} to {most}")
        self.make_planner()
        if POOLS[self.pool].resident and self.slice_time is None:
            raise ConfigError(
                f"slice_time: got None; allowed: a time of slices of a continuous engine, for"
                f" pool {self.pool!r} keeps KV between slices; --profile gives one"
            )

    def make_planner(self) -> Planner:
        """The planner, fresh. Raises ConfigError."""
        setup = PoolSetup(
            instances=self.replicas,
            memory=self.memory,
            time=self.estimate,
            slice_len=self.slice_len,
            max_rows=self.max_rows,
        )
        try:
            return make_pool(self.pool, self.pool_options, setup)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def simulate_pool(
    feed: Feed,
    config: PoolConfig,
    recorder: Recorder,
    *,
    on_refusal: Callable[[str], None] = lambda why: None,
    tick: Tick = lambda num_ended, now_s: None,
) -> None:
    """Run a workload to its end and record what its clients saw. Deterministic.

    Requests that can never fit end as "refused" when they come; `on_refusal` is told why. `tick` is
    called now and then.
    """
    _PoolSimulation(feed, config, recorder, on_refusal).run(tick)


@dataclass(slots=True)
class _Alive:
    """A request that was sent and has not ended."""

    work: Work
    sent_s: float
    made: int = 0
    slices: int = 0
    prefilled: bool = False
    first_s: float | None = None


@dataclass(slots=True)
class _Instance:
    """One instance: its batches in order, the first of which runs, and its counters."""

    number: int
    queue: deque[Batch] = field(default_factory=deque)
    run: BatchRun | None = None
    begin_s: float = 0.0
    batches: int = 0
    early_returns: int = 0
    rows: int = 0
    recomputed_prefill_tokens: int = 0
    pad_tokens: int = 0
    invalid_tokens: int = 0
    dropped: int = 0
    ended: int = 0
    slices_of_ended: int = 0
    estimator_error: float = 0.0
    busy_s: float = 0.0
    last_end_s: float = 0.0

    def statistics(self) -> dict[str, int | float]:
        """Counters by name; means are per batch or per request that ended here."""
        batches, ended = max(1, self.batches), max(1, self.ended)
        return {
            "batches": self.batches,
            "early_returns": self.early_returns,
            "rows_per_batch": self.rows / batches,
            "recomputed_prefill_tokens": self.recomputed_prefill_tokens,
            "pad_tokens": self.pad_tokens,
            "invalid_tokens": self.invalid_tokens,
            "dropped": self.dropped,
            "ended": self.ended,
            "slices_per_request": self.slices_of_ended / ended,
            "estimator_error": self.estimator_error / batches,
            "busy_s": self.busy_s,
            "last_end_s": self.last_end_s,
        }


class _PoolSimulation:
    def __init__(
        self,
        feed: Feed,
        config: PoolConfig,
        recorder: Recorder,
        on_refusal: Callable[[str], None],
    ):
        self._feed, self._config, self._recorder = feed, config, recorder
        self._on_refusal = on_refusal
        self._planner = config.make_planner()
        self._resident = POOLS[config.pool].resident
        self._instances = [_Instance(number) for number in range(config.replicas)]
        self._alive: dict[int, _Alive] = {}
        self._events: list[tuple[float, int, int, int, str]] = []
        self._order = itertools.count()
        self._num_ended = 0

    def run(self, tick: Tick) -> None:
        now_s = 0.0
        while True:
            due_s = self._planner.due_s(now_s)
            moments = [due_s, self._feed.next_s(), self._events[0][0] if self._events else None]
            known = [moment for moment in moments if moment is not None]
            if not known:
                break
            now_s = max(now_s, min(known))
            self._take_events(now_s)
            self._take_arrivals(now_s)
            # Asked again: what has just happened may have made a plan due, or put it off.
            due_s = self._planner.due_s(now_s)
            if due_s is not None and due_s <= now_s:
                self._plan(now_s)
            tick(self._num_ended, now_s)
        assert not self._alive, f"{len(self._alive)} requests were never planned"
        for instance in self._instances:
            self._recorder.replica(instance.number, instance.statistics())

    def _at(self, at_s: float, kind: int, which: int, reason: str = "") -> None:
        heapq.heappush(self._events, (at_s, kind, next(self._order), which, reason))

    def _take_events(self, now_s: float) -> None:
        while self._events and self._events[0][0] <= now_s:
            _, kind, _, which, reason = heapq.heappop(self._events)
            if kind == _RAN:
                self._ran(self._instances[which], now_s)
            elif which in self._alive:
                self._planner.left(which)
                self._end(which, now_s, reason)

    def _take_arrivals(self, now_s: float) -> None:
        for at_s, work in self._feed.take(now_s):
            self._recorder.sent(work, at_s)
            request = PoolRequest(work.number, at_s, work.prompt_tokens, work.max_tokens)
            self._alive[work.number] = _Alive(work, at_s)
            try:
                self._planner.check(request)
            except ValueError as error:
                self._on_refusal(str(error))
                self._end(work.number, now_s, "refused")
                continue
            self._planner.arrived(request)
            for after_s, reason in ((work.abort_s, "abort"), (work.deadline_s, "deadline")):
                if after_s is not None:
                    self._at(at_s + after_s, _GONE, work.number, reason)

    def _plan(self, now_s: float) -> None:
        for batch in self._planner.plan(now_s):
            instance = self._instances[batch.instance]
            instance.dropped += len(batch.drops)
            instance.queue.append(batch)
            if instance.run is None:
                self._begin(instance, now_s)

    def _begin(self, instance: _Instance, now_s: float) -> None:
        """Start the first batch of the instance's queue."""
        batch = instance.queue[0]
        rows = [self._row(number, number in batch.prefills) for number in batch.rows]
        if self._resident:
            config = self._config
            assert config.slice_time is not None
            run = continuous_slice(rows, batch.steps, config.slice_time, config.buckets)
        else:
            time = self._config.padded_time or self._config.estimate
            run = padded_static(rows, batch.steps, time)
        for number in batch.rows:
            alive = self._alive.get(number)
            if alive is not None and alive.first_s is None:
                alive.first_s = now_s
        for number in batch.prefills:
            self._count_prefill(instance, number)
        instance.run, instance.begin_s = run, now_s
        self._at(now_s + run.seconds, _RAN, instance.number)

    def _row(self, number: int, prefills: bool) -> Row:
        alive = self._alive.get(number)
        if alive is None:  # gone since it was planned; its place in the batch is padding
            return Row(0, 0, False)
        work = alive.work
        return Row(work.prompt_tokens + alive.made, work.output_tokens - alive.made, prefills)

    def _count_prefill(self, instance: _Instance, number: int) -> None:
        alive = self._alive.get(number)
        if alive is None:
            return
        if alive.prefilled:
            instance.recomputed_prefill_tokens += alive.work.prompt_tokens + alive.made
        alive.prefilled = True

    def _ran(self, instance: _Instance, now_s: float) -> None:
        """The batch that the instance runs has ended."""
        batch, run = instance.queue.popleft(), instance.run
        assert run is not None
        made = dict(zip(batch.rows, run.made, strict=True))
        gone = sum(tokens for number, tokens in made.items() if number not in self._alive)
        seconds = now_s - instance.begin_s
        if run.steps:
            self._count_batch(instance, batch, run, seconds, invalid=run.invalid_tokens + gone)
            self._recorder.slice(
                instance.number,
                instance.begin_s,
                now_s,
                steps=run.steps,
                rows=len(batch.rows),
                prefill_tokens=run.prefill_tokens,
                output_tokens=sum(run.made) - gone,
                pad_tokens=run.pad_tokens,
                invalid_tokens=run.invalid_tokens + gone,
            )
        ended = {number for number, tokens in made.items() if self._deliver(number, tokens, now_s)}
        self._planner.ran(batch, Ran(run.steps, seconds, made, frozenset(ended)))
        for number in ended:
            self._count_end(instance, number, now_s)
        instance.run = None
        if instance.queue:
            self._begin(instance, now_s)

    def _deliver(self, number: int, tokens: int, now_s: float) -> bool:
        """Whether the request has now made all that it will."""
        alive = self._alive.get(number)
        if alive is None:
            return False
        alive.slices += 1
        alive.made += tokens
        if tokens:
            self._recorder.delivered(number, now_s, tokens)
        return alive.made >= alive.work.output_tokens

    def _count_batch(
        self, instance: _Instance, batch: Batch, run: BatchRun, seconds: float, *, invalid: int
    ) -> None:
        instance.batches += 1
        instance.early_returns += run.steps < batch.steps
        instance.rows += len(batch.rows)
        instance.pad_tokens += run.pad_tokens
        instance.invalid_tokens += invalid
        instance.estimator_error += abs(self._planner.predict_s(batch, run.steps) / seconds - 1)
        instance.busy_s += seconds
        instance.last_end_s = instance.begin_s + seconds

    def _count_end(self, instance: _Instance, number: int, now_s: float) -> None:
        alive = self._alive[number]
        instance.ended += 1
        instance.slices_of_ended += alive.slices
        work = alive.work
        reason = "length" if work.output_tokens >= work.max_tokens else "stop"
        self._end(number, now_s, reason, replica=instance.number)

    def _end(self, number: int, now_s: float, reason: str, *, replica: int | None = None) -> None:
        alive = self._alive.pop(number)
        work, first_s, sent_s = alive.work, alive.first_s, alive.sent_s
        queue_s = None if first_s is None else first_s - sent_s
        self._recorder.ended(number, now_s, reason, 0, replica=replica, queue_s=queue_s)
        self._feed.ended(work, now_s)
        self._num_ended += 1
