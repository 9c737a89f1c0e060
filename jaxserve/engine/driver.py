"""Joins core and executor: the one thread that plans, dispatches and parses slices.

Everything else talks to it through a queue, so the core needs no locks and JAX sees one thread.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from jaxserve.clock import Clock
from jaxserve.engine.core import EngineCore, Rejection
from jaxserve.engine.event_log import EventLog
from jaxserve.engine.executor import Executor
from jaxserve.errors import JaxserveError
from jaxserve.models.info import ModelInfo
from jaxserve.request import Delta, FinishReason, Limits, Request

T = TypeVar("T")
OnReport = Callable[[int, Sequence[Delta], Sequence[Rejection]], None]
OnFailure = Callable[[BaseException], None]


class EngineDriver:
    """Owns the dispatch thread. All methods are thread-safe and return at once.

    `on_report` is called on that thread, once per parsed slice and when requests end or are refused
    between slices; `on_failure` once if the thread dies: nothing is served after that.

    A slice's `host_s` is this thread's processor time. By the clock on the wall, a host that shares
    its core with the device would take that one's work for its own, and overlap would seem to pay.
    """

    def __init__(
        self,
        core: EngineCore,
        executor: Executor,
        clock: Clock,
        *,
        info: ModelInfo,
        on_report: OnReport,
        on_failure: OnFailure,
        log: EventLog | None = None,
    ):
        self.core, self.info = core, info
        self._executor, self._clock = executor, clock
        self._on_report, self._on_failure = on_report, on_failure
        self._log = log
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._rejections: list[Rejection] = []
        self._flights: deque[tuple[int, object]] = deque()
        self._stopping = False
        self._host_since_s = 0.0
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)

    @property
    def limits(self) -> Limits:
        return self.core.config.limits

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what is in flight, then end the thread."""
        self._commands.put(None)
        self._thread.join()
        if self._log is not None:
            self._log.close()

    def submit(self, request: Request) -> None:
        """Queue a request; a refusal arrives through `on_report`."""
        self._commands.put(lambda: self._submit(request))

    def abort(
        self,
        request_id: str,
        *,
        sample: int = -1,
        reason: FinishReason = FinishReason.ABORT,
        keep_tokens: int | None = None,
    ) -> None:
        """End a request or one of its samples; see `EngineCore.abort`."""

        def command() -> None:
            if self._log is not None:
                self._log.abort(self._clock.now(), request_id, sample, reason, keep_tokens)
            self.core.abort(request_id, sample=sample, reason=reason, keep_tokens=keep_tokens)

        self._commands.put(command)

    def limit_row(self, request_id: str, sample: int, max_steps: int) -> None:
        """Bound a sample's steps per slice; see `EngineCore.limit_row`."""

        def command() -> None:
            if self._log is not None:
                self._log.limit(self._clock.now(), request_id, sample, max_steps)
            self.core.limit_row(request_id, sample, max_steps)

        self._commands.put(command)

    def call(self, function: Callable[[EngineCore], T]) -> "Future[T]":
        """Run a function on the dispatch thread, between slices."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(function(self.core))
            except Exception as error:
                future.set_exception(error)

        self._commands.put(command)
        return future

    def _run(self) -> None:
        try:
            self._host_since_s = time.thread_time()
            while not self._stopping or self._flights:
                self._turn()
        except BaseException as error:
            self._on_failure(error)

    def _turn(self) -> None:
        """One round: fill the device, then report, then parse the oldest slice or wait for work."""
        self._take_commands()
        while not self._stopping and self._dispatch_next():
            self._take_commands()
        # Reporting comes after dispatching: the device never waits for it.
        self._report(0)
        if self._flights:
            self._parse_oldest()
        else:
            self._wait_for_work()

    def _dispatch_next(self) -> bool:
        now_s = self._clock.now()
        plan = self.core.next_slice(now_s)
        if plan is not None:
            self._flights.append((plan.number, self._executor.dispatch(plan)))
        if self._log is not None:
            self._log.slice(now_s, plan)
        return plan is not None

    def _parse_oldest(self) -> None:
        number, ticket = self._flights.popleft()
        worked_s = time.thread_time() - self._host_since_s
        result = self._executor.wait(ticket)
        result.host_s = worked_s
        now_s, self._host_since_s = self._clock.now(), time.thread_time()
        if self._log is not None:
            self._log.complete(now_s, result)
        self.core.complete(result, now_s)
        # The next slice first: with one in flight at most, the device is idle now.
        self._take_commands()
        while not self._stopping and self._dispatch_next():
            pass
        self._report(number)

    def _report(self, number: int) -> None:
        deltas, rejections = self.core.take_deltas(), self._rejections
        if deltas or rejections:
            self._rejections = []
            self._on_report(number, deltas, rejections)

    def _submit(self, request: Request) -> None:
        now_s = self._clock.now()
        if self._log is not None:
            self._log.submit(now_s, request)
        try:
            self.core.submit(request, now_s)
        except JaxserveError as error:
            self._rejections.append(Rejection(request.request_id, error))

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._obey(self._commands.get())

    def _wait_for_work(self) -> None:
        if self._stopping:
            return
        expiry_s = self.core.next_expiry_s()
        timeout_s = None if expiry_s is None else max(0.0, expiry_s - self._clock.now())
        try:
            command = self._commands.get(timeout=timeout_s)
        except queue.Empty:
            return
        self._host_since_s = time.thread_time()
        self._obey(command)

    def _obey(self, command: Callable[[], None] | None) -> None:
        if command is None:
            self._stopping = True
        else:
            command()
