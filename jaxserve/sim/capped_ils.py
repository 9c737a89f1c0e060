"""Iteration-level scheduling with a cap on parallel requests: the baseline ILS of SCLS, simulated.

Continuous batching, one step at a time, first come first served, requests to instances in turn.
Between two changes of the rows all steps are run in one go, so that tokens are delivered at the
changes: right for first tokens, ends and throughput, not for gaps between tokens.

`reserve` max: a request is let in when all that the rows may still make fits, so that nobody is
ever preempted. prompt: when its prompt fits; rows that outgrow memory preempt the newest, which is
computed again.
"""

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from jaxserve.report.recorder import Recorder
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import SliceTime
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class IlsConfig:
    """`max_rows` is the cap; `memory` that of each of `replicas` instances, counted in tokens."""

    memory: KvMemory
    slice_time: SliceTime
    replicas: int = 8
    max_rows: int = 26
    reserve: Literal["max", "prompt"] = "max"


@dataclass(slots=True)
class _Row:
    work: Work
    made: int = 0

    @property
    def length(self) -> int:
        return self.work.prompt_tokens + self.made

    @property
    def left(self) -> int:
        return self.work.output_tokens - self.made


@dataclass(slots=True)
class _Instance:
    """`steps` of the rows are under way since `begin_s`; `fresh` rows prefill in them."""

    waiting: deque[_Row] = field(default_factory=deque)
    rows: list[_Row] = field(default_factory=list)
    fresh: list[_Row] = field(default_factory=list)
    steps: int = 0
    begin_s: float = 0.0
    version: int = 0
    busy_s: float = 0.0
    last_end_s: float = 0.0
    preemptions: int = 0


def simulate_ils(feed: Feed, config: IlsConfig, recorder: Recorder) -> None:
    """Run a workload to its end. Who can never fit ends as "refused"."""
    _IlsSimulation(feed, config, recorder).run()


class _IlsSimulation:
    def __init__(self, feed: Feed, config: IlsConfig, recorder: Recorder):
        self._feed, self._config, self._recorder = feed, config, recorder
        self._instances = [_Instance() for _ in range(config.replicas)]
        self._turn = itertools.cycle(range(config.replicas))
        self._ends: list[tuple[float, int, int]] = []

    def run(self) -> None:
        while True:
            arrival_s, end_s = self._feed.next_s(), self._ends[0][0] if self._ends else None
            if end_s is not None and (arrival_s is None or end_s <= arrival_s):
                _, number, version = heapq.heappop(self._ends)
                if version == self._instances[number].version:
                    self._advance(number, self._instances[number].steps, end_s)
            elif arrival_s is not None:
                for at_s, work in self._feed.take(arrival_s):
                    self._arrive(work, at_s, arrival_s)
            else:
                break
        for number, instance in enumerate(self._instances):
            assert not instance.rows and not instance.waiting
            self._recorder.replica(
                number,
                {
                    "busy_s": instance.busy_s,
                    "last_end_s": instance.last_end_s,
                    "preemptions": instance.preemptions,
                },
            )

    def _arrive(self, work: Work, at_s: float, now_s: float) -> None:
        self._recorder.sent(work, at_s)
        if work.prompt_tokens + work.max_tokens > self._config.memory.num_tokens:
            self._recorder.ended(work.number, now_s, "refused", 0)
            self._feed.ended(work, now_s)
            return
        number = next(self._turn)
        instance = self._instances[number]
        instance.waiting.append(_Row(work))
        if not instance.rows:
            self._start(number, now_s)
        elif len(instance.waiting) == 1 and instance.steps > 1 and self._fits(instance):
            self._cut(number, now_s)

    def _cut(self, number: int, now_s: float) -> None:
        """End what is under way with the step that runs now, for somebody may come in."""
        instance = self._instances[number]
        low, high = 1, instance.steps
        while low < high:
            middle = (low + high) // 2
            if instance.begin_s + self._seconds(instance, middle) >= now_s:
                high = middle
            else:
                low = middle + 1
        self._run(number, low)

    def _fits(self, instance: _Instance) -> bool:
        if len(instance.rows) >= self._config.max_rows:
            return False
        rows = [*instance.rows, instance.waiting[0]]
        if self._config.reserve == "max":
            need = sum(row.work.prompt_tokens + row.work.max_tokens for row in rows)
        else:  # and a step for everybody
            need = sum(row.length + 1 for row in rows)
        return need <= self._config.memory.num_tokens

    def _start(self, number: int, now_s: float) -> None:
        """Let in whom it may and run to the next end of a row; one step if somebody came in."""
        instance = self._instances[number]
        instance.begin_s = now_s
        while instance.waiting and self._fits(instance):
            row = instance.waiting.popleft()
            instance.rows.append(row)
            instance.fresh.append(row)
        free = self._config.memory.num_tokens - sum(row.length for row in instance.rows)
        while free < len(instance.rows):
            newest = instance.rows.pop()
            if newest in instance.fresh:
                instance.fresh.remove(newest)
            free += newest.length
            instance.waiting.appendleft(newest)
            instance.preemptions += 1
        if not instance.rows:
            return
        least = min(row.left for row in instance.rows)
        self._run(number, 1 if instance.fresh else min(least, free // len(instance.rows)))

    def _run(self, number: int, steps: int) -> None:
        instance = self._instances[number]
        instance.steps = steps
        instance.version += 1
        end_s = instance.begin_s + self._seconds(instance, steps)
        heapq.heappush(self._ends, (end_s, number, instance.version))

    def _seconds(self, instance: _Instance, steps: int) -> float:
        """Of so many single steps of the rows, each as at the mean context."""
        rows = len(instance.rows)
        context = sum(row.length for row in instance.rows)
        shape = SliceShape(
            steps=1,
            rows=rows,
            attended_tokens=context + rows * (steps + 1) // 2,
            prefill_tokens=sum(row.length for row in instance.fresh),
            prefill_attended_tokens=sum(
                row.length * (row.length + 1) // 2 for row in instance.fresh
            ),
        )
        time = self._config.slice_time
        return steps * max(time.slice_s(shape), time.host_s(shape))  # overlap hides the host

    def _advance(self, number: int, steps: int, now_s: float) -> None:
        """So many steps have run."""
        instance = self._instances[number]
        self._recorder.slice(
            number,
            instance.begin_s,
            now_s,
            steps=steps,
            rows=len(instance.rows),
            prefill_tokens=sum(row.length for row in instance.fresh),
            output_tokens=steps * len(instance.rows),
        )
        instance.busy_s += now_s - instance.begin_s
        instance.last_end_s = now_s
        instance.fresh.clear()
        for row in instance.rows:
            row.made += steps
            self._recorder.delivered(row.work.number, now_s, steps)
            if not row.left:
                work = row.work
                reason = "length" if work.output_tokens >= work.max_tokens else "stop"
                self._recorder.ended(work.number, now_s, reason, 0, replica=number)
                self._feed.ended(work, now_s)
        instance.rows = [row for row in instance.rows if row.left]
        self._start(number, now_s)
