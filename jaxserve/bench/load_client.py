"""The load client: sends a workload when its feed says so, and records what became of it.

One asyncio loop in one process, whatever the dialect. Knows no dialect (`transport.py`), no
arrivals (`workload/feed.py`) and no statistics (`recorder.py`, `tally.py`).

Times count from the run's start; a request's, from when it was due. So what the client itself adds
counts, and is shown as its lateness: a load client that is too busy measures itself.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from jaxserve.bench.tally import Tally
from jaxserve.bench.transport import Ending, Transport
from jaxserve.report.recorder import Recorder
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work

LEAD_S: Final = 0.1
"""Requests are made ready so long before they are due, as far as the feed knows them by then."""

Draw = Callable[[Work], np.ndarray]
"""The prompt's token ids, int32 [T]."""


class LoadClient:
    """One run. `send_s` ends the sending early; `grace_s` is the longest wait for answers after it.

    `recorder` and `tally` hear of every request, in the order of time for each. Requests still
    running when the run is cut short, by `stop`, by `grace_s` or because the server died, have no
    end in either.
    """

    def __init__(
        self,
        transport: Transport,
        feed: Feed,
        draw: Draw,
        *,
        recorder: Recorder,
        tally: Tally,
        send_s: float | None = None,
        grace_s: float = 60.0,
    ):
        self._transport, self._feed, self._draw = transport, feed, draw
        self._recorder, self._tally = recorder, tally
        self._send_s, self._grace_s = send_s, grace_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_planned = 0
        self._wake = asyncio.Event()
        self._stopped = False
        self._probe: asyncio.Task[None] | None = None
        self.begun_s = 0.0
        """When the run began, by `time.perf_counter`."""
        self.died = False
        """Whether the server was lost on the way."""

    async def run(self) -> None:
        """Send everything and wait for the answers."""
        self.begun_s = time.perf_counter()
        try:
            await self._send_all()
            await self._wait_for_answers()
        finally:
            self._stopped = True
            await self._drop_running()
            self._tally.close(self._now_s())

    def stop(self) -> None:
        """Send nothing more and wait for nothing more: `run` returns at once."""
        self._stopped = True
        self._wake.set()

    # ---------------------------------------------------------------------------- sending

    def _now_s(self) -> float:
        return time.perf_counter() - self.begun_s

    async def _send_all(self) -> None:
        while not self._stopped:
            now_s = self._now_s()
            if self._send_s is not None and now_s >= self._send_s:
                return
            for due_s, work in self._feed.take(now_s + LEAD_S):
                if self._send_s is None or due_s <= self._send_s:
                    self._plan(due_s, work)
                    await asyncio.sleep(0)  # a long prompt must not hold up what is due
            next_s = self._feed.next_s()
            if next_s is None and not self._tasks and not self._num_planned:
                return
            await self._sleep_until(None if next_s is None else next_s - LEAD_S)

    async def _sleep_until(self, at_s: float | None) -> None:
        """Until `at_s`, None: for ever; an end or a stop wakes it up."""
        if self._stopped:
            return
        self._wake.clear()
        loop, timer = asyncio.get_running_loop(), None
        times = [it for it in (at_s, self._send_s) if it is not None]
        if times:
            timer = loop.call_later(max(0.0, min(times) - self._now_s()), self._wake.set)
        await self._wake.wait()
        if timer is not None:
            timer.cancel()

    def _plan(self, due_s: float, work: Work) -> None:
        prepared = self._transport.prepare(work, self._draw(work))
        self._num_planned += 1
        delay_s = due_s - self._now_s()
        if delay_s <= 0:
            self._begin(due_s, work, prepared)
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(delay_s, self._begin, due_s, work, prepared)

    def _begin(self, due_s: float, work: Work, prepared: object) -> None:
        self._num_planned -= 1
        if self._stopped:
            return
        self._recorder.sent(work, due_s)
        self._tally.sent(work, due_s, self._now_s() - due_s)
        task = asyncio.create_task(self._one(due_s, work, prepared))
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()  # not before: whoever wakes up looks whether any are left

    # ---------------------------------------------------------------------------- one request

    async def _one(self, due_s: float, work: Work, prepared: object) -> None:
        number, begun_s = work.number, self.begun_s
        delivered, count = self._recorder.delivered, self._tally.delivered

        def on_tokens(at_s: float, num_tokens: int) -> None:
            delivered(number, at_s - begun_s, num_tokens)
            count(number, at_s - begun_s, num_tokens)

        ending = await self._ending(due_s, work, prepared, on_tokens)
        if ending is None:
            return
        now_s = self._now_s()
        self._recorder.ended(number, now_s, ending.reason, ending.cached_tokens)
        self._tally.ended(number, now_s, ending)
        self._feed.ended(work, now_s)
        if ending.lost and self._probe is None and not self._stopped:
            self._probe = asyncio.create_task(self._look_for_server())

    async def _ending(
        self, due_s: float, work: Work, prepared: object, on_tokens: Callable[[float, int], None]
    ) -> Ending | None:
        """None: the run was cut short."""
        late_s = self._now_s() - due_s
        timeout_s = None if work.deadline_s is None else max(0.001, work.deadline_s - late_s)
        try:
            if work.abort_s is None:
                return await self._transport.send(prepared, timeout_s, on_tokens)
            async with asyncio.timeout(max(0.0, work.abort_s - late_s)):
                return await self._transport.send(prepared, timeout_s, on_tokens)
        except TimeoutError:
            return Ending(reason="abort")
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            return None

    async def _look_for_server(self) -> None:
        """After a lost connection: a server that cannot be reached any more ends the run."""
        if not await self._transport.alive():
            self.died = True
            self.stop()
        self._probe = None

    # ---------------------------------------------------------------------------- the end

    async def _wait_for_answers(self) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._grace_s
        while (self._tasks or self._num_planned) and not self._stopped:
            left_s = until_s - loop.time()
            if left_s <= 0:
                return
            self._wake.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _drop_running(self) -> None:
        tasks = list(self._tasks)
        if self._probe is not None:
            tasks.append(self._probe)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
