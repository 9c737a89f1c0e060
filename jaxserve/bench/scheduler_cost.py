"""What a scheduling cycle costs on the host, by order and length of the queue, without a device.

A cycle is what the dispatch thread does for one slice: it takes in arrivals, plans, leases, packs
the plan, and takes in the result. The order's share is the time inside its own methods: its events,
its plan, the cache changes it hears of. Results come from the scripted executor, outside of the
clock.

Half of every prompt is shared by all requests. Every so often that prefix is evicted, and a cycle
later inserted again, as far as the order knows: the changes that touch everybody who waits.
"""

import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from jaxserve.config import SchedulerConfig
from jaxserve.engine.batch import BatchShape, Packer
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.garbage import settle_collector
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.request import Limits, Request, SamplingParams
from jaxserve.schedulers.events import Event
from jaxserve.schedulers.order import Order
from jaxserve.schedulers.prefix_tree import NO_PARENT, Removed, Stored, page_keys

ROWS: Final = 256
PAGE_SIZE: Final = 64
PROMPT_TOKENS: Final = 1024
ARRIVALS_PER_S: Final = 1000
OUTPUT_TOKENS: Final = (40, 120)
STEP_S: Final = ROWS / (ARRIVALS_PER_S * sum(OUTPUT_TOKENS) / 2)
"""A step takes so long that as many rows end as requests arrive, in the mean: 3.2 ms."""
CLIENTS: Final = 100
CHANGE_EVERY: Final = 10
"""Cycles between changes of the shared prefix."""
MOST_WEIGHED: Final = 5000
"""Of so many requests the memory is measured, which takes long."""
WARM_STEPS: Final = 4 * max(OUTPUT_TOKENS)
"""Until rows that began together no longer end together."""


@dataclass(frozen=True, slots=True)
class SchedulerCost:
    """Milliseconds of a cycle, and bytes that a waiting request takes beside its tokens.

    `steps` is the length of a slice, and so how many requests arrive and end in a cycle.
    """

    order: str
    steps: int
    num_waiting: int
    order_mean_ms: float
    order_p99_ms: float
    cycle_mean_ms: float
    cycle_p99_ms: float
    bytes_per_waiting: float


class _Timed:
    """An order whose methods are timed."""

    def __init__(self, order: Order):
        self._order = order
        self.seconds = 0.0
        self._on = self.timed(order.on)

    def on(self, event: Event) -> None:
        self._on(event)

    def timed(self, on: Callable[[Any], None]) -> Callable[[Any], None]:
        """`on`, on this clock."""

        def timed_on(event: Event) -> None:
            began_s = time.perf_counter()
            on(event)
            self.seconds += time.perf_counter() - began_s

        return timed_on

    def next(self) -> int | None:
        began_s = time.perf_counter()
        number = self._order.next()
        self.seconds += time.perf_counter() - began_s
        return number

    def waiting(self) -> Iterator[int]:
        return self._order.waiting()  # not asked for in a cycle

    def running(self) -> list[int]:
        began_s = time.perf_counter()
        numbers = self._order.running()
        self.seconds += time.perf_counter() - began_s
        return numbers


class _Load:
    """Requests with a shared half, from clients of very different appetite."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._shared = self._rng.integers(0, 1000, PROMPT_TOKENS // 2).astype(np.int32)
        self.shared_keys = tuple(
            page_keys(self._shared, page_size=PAGE_SIZE, scope="all", model="bench")
        )
        shares = 1.0 / np.arange(1, CLIENTS + 1)
        self._shares = shares / shares.sum()
        self._num_made = 0

    def request(self) -> Request:
        self._num_made += 1
        own = self._rng.integers(0, 1000, PROMPT_TOKENS - self._shared.size).astype(np.int32)
        prompt = np.concatenate([self._shared, own])
        keys = page_keys(prompt, page_size=PAGE_SIZE, scope="all", model="bench")
        return Request(
            request_id=f"r{self._num_made}",
            prompt=prompt,
            params=SamplingParams(max_tokens=int(self._rng.integers(*OUTPUT_TOKENS)), seed=1),
            client=f"client-{self._rng.choice(CLIENTS, p=self._shares)}",
            priority=int(self._rng.integers(0, 4)),
            page_keys=tuple(keys),
            scope="all",
        )


def measure(
    order: str, *, num_waiting: int, num_cycles: int, steps: int, seed: int = 0
) -> SchedulerCost:
    """Cycles with about `num_waiting` requests in the queue, and slices of `steps` steps."""
    load, core = _Load(seed), _make_core(order, steps)
    settle_collector()
    requests = [load.request() for _ in range(num_waiting + ROWS)]
    weighed = requests[:MOST_WEIGHED]
    tracemalloc.start()
    for request in weighed:
        core.submit(request, 0.0)
    bytes_per_waiting = tracemalloc.get_traced_memory()[0] / len(weighed)
    tracemalloc.stop()
    for request in requests[MOST_WEIGHED:]:
        core.submit(request, 0.0)
    timed = _Timed(core.order)
    core.order = timed
    core.pool.tree.on_change = timed.timed(core.pool.tree.on_change)
    order_s, cycle_s = _run(core, timed, load, num_cycles)
    return SchedulerCost(
        order=order,
        steps=steps,
        num_waiting=num_waiting,
        order_mean_ms=1e3 * float(np.mean(order_s)),
        order_p99_ms=1e3 * float(np.percentile(order_s, 99)),
        cycle_mean_ms=1e3 * float(np.mean(cycle_s)),
        cycle_p99_ms=1e3 * float(np.percentile(cycle_s, 99)),
        bytes_per_waiting=bytes_per_waiting,
    )


def _make_core(order: str, steps: int) -> EngineCore:
    most = PROMPT_TOKENS + max(OUTPUT_TOKENS)
    return EngineCore(
        CoreConfig(
            limits=Limits(vocab_size=1000, max_context=2 * most, max_samples=1),
            model_key="bench",
            num_pages=2 * ROWS * most // PAGE_SIZE,
            page_size=PAGE_SIZE,
            tile=32,
            scheduler=SchedulerConfig(
                order=order,
                slicing="fixed",
                slice_steps=steps,
                max_rows=ROWS,
                max_prefill_tokens=65536,
                max_waiting=10**6,
                max_waiting_tokens=10**9,
                queue_timeout_s=0.0,
            ),
        )
    )


def _run(
    core: EngineCore, timed: _Timed, load: _Load, num_cycles: int
) -> tuple[list[float], list[float]]:
    """Seconds of the order and of all, cycle by cycle."""
    executor = ScriptedExecutor(vocab_size=1000)
    table_pages = core.config.limits.max_context // PAGE_SIZE + 1
    steps = core.config.scheduler.slice_steps
    shape = BatchShape(tile=32, table_pages=table_pages, step_buffer=steps, max_rows=ROWS)
    buckets = (Bucket(ROWS, 0), Bucket(ROWS, 2048))
    num_pages = core.config.num_pages
    packer = Packer(shape, buckets, num_pages=num_pages, page_size=PAGE_SIZE)
    order_s: list[float] = []
    cycle_s: list[float] = []
    warm, num_arrived = WARM_STEPS // steps, 0
    for cycle in range(warm + num_cycles):
        now_s = cycle * steps * STEP_S
        arrivals = [load.request() for _ in range(int(ARRIVALS_PER_S * now_s) - num_arrived)]
        num_arrived += len(arrivals)
        timed.seconds, began_s = 0.0, time.perf_counter()
        for request in arrivals:
            core.submit(request, now_s)
        plan: Any = core.next_slice(now_s)
        packer.pack(plan)
        if cycle % CHANGE_EVERY == 0:
            core.pool.tree.on_change(Removed(0, load.shared_keys[::-1]))
        elif cycle % CHANGE_EVERY == 1:
            core.pool.tree.on_change(Stored(0, NO_PARENT, load.shared_keys))
        host_s = time.perf_counter() - began_s
        result = executor.wait(executor.dispatch(plan))
        began_s = time.perf_counter()
        core.complete(result, now_s)
        core.take_deltas()
        host_s += time.perf_counter() - began_s
        if cycle >= warm:
            order_s.append(timed.seconds)
            cycle_s.append(host_s)
    return order_s, cycle_s
