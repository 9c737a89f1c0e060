"""What a routing decision costs on the host, by policy and size of the fleet, without replicas.

A decision is `Router.route`: the match, the choice, and taking note of it, the prompt's page keys
being given. Around it goes what a fleet tells: per request its end and the pages it stored, and
every so often a load report and an eviction.

Prompts share their first half within families. The global tree is full, so that each decision
evicts what it inserts.
"""

import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

from jaxserve.engine.garbage import settle_collector
from jaxserve.fleet.router import Router
from jaxserve.schedulers.catalog import ROUTINGS, make_routing
from jaxserve.schedulers.prefix_tree import KEY_BYTES, Removed, Stored
from jaxserve.schedulers.routing import LoadReport, Routable

PAGE_SIZE: Final = 64
PROMPT_TOKENS: Final = 4096
FAMILIES: Final = 200
CLIENTS: Final = 100
OUTPUT_PAGES: Final = 4
LIVE_PER_REPLICA: Final = 16
REPORT_EVERY: Final = 4
EVICT_EVERY: Final = 8


@dataclass(frozen=True, slots=True)
class RoutingCost:
    """Microseconds of a decision, and of all else the router is told, per request.

    `decision_cpu_p99_us` is this thread's own time: on a busy machine the clock counts others' too.
    """

    routing: str
    num_replicas: int
    tree_pages: int
    decision_p50_us: float
    decision_p99_us: float
    decision_cpu_p99_us: float
    decision_mean_us: float
    told_mean_us: float


def measure(
    routing: str, *, num_replicas: int, tree_pages: int, num_decisions: int, seed: int = 0
) -> RoutingCost:
    """Decisions while each replica has some requests; policies with a tree have a full one."""
    options = [f"tree_pages={tree_pages}"] if "prefixes" in ROUTINGS[routing].needs else []
    policy = make_routing(routing, options, num_replicas=num_replicas, page_size=PAGE_SIZE)
    fleet = _Fleet(Router(policy, num_replicas=num_replicas), random.Random(seed))
    warm = LIVE_PER_REPLICA * num_replicas
    if options:
        warm = max(warm, 3 * tree_pages // (PROMPT_TOKENS // PAGE_SIZE))
    for _ in range(warm):
        fleet.step()
    settle_collector()
    costs = [fleet.step() for _ in range(num_decisions)]
    decisions_us, cpu_us, told_us = 1e6 * np.array(costs).T
    return RoutingCost(
        routing=routing,
        num_replicas=num_replicas,
        tree_pages=tree_pages if options else 0,
        decision_p50_us=float(np.percentile(decisions_us, 50)),
        decision_p99_us=float(np.percentile(decisions_us, 99)),
        decision_cpu_p99_us=float(np.percentile(cpu_us, 99)),
        decision_mean_us=float(decisions_us.mean()),
        told_mean_us=float(told_us.mean()),
    )


class _Fleet:
    """Sends requests, and ends the oldest when there are enough."""

    def __init__(self, router: Router, rng: random.Random):
        self._router, self._rng = router, rng
        half = PROMPT_TOKENS // PAGE_SIZE // 2
        self._families = [self._keys(half) for _ in range(FAMILIES)]
        self._live: deque[tuple[Routable, int]] = deque()
        self._num_made = 0

    def _keys(self, number: int) -> tuple[bytes, ...]:
        return tuple(self._rng.randbytes(KEY_BYTES) for _ in range(number))

    def _request(self) -> Routable:
        self._num_made += 1
        family = self._families[int(FAMILIES * self._rng.random() ** 2)]
        return Routable(
            number=self._num_made,
            client=f"client-{int(CLIENTS * self._rng.random() ** 2)}",
            num_prompt_tokens=PROMPT_TOKENS + 1,
            page_keys=(*family, *self._keys(len(family))),
            session=f"session-{self._rng.randrange(1000)}",
        )

    def step(self) -> tuple[float, float, float]:
        """One request comes, and mostly one ends: seconds of the decision, by the clock and of this
        thread, and of the rest."""
        router, request = self._router, self._request()
        now_s = 1e-3 * self._num_made
        began_cpu_s, began_s = time.thread_time(), time.perf_counter()
        replica = router.route(request, now_s)
        decided_s = time.perf_counter() - began_s
        cpu_s = time.thread_time() - began_cpu_s
        self._live.append((request, replica))
        if len(self._live) <= LIVE_PER_REPLICA * len(router.views):
            return decided_s, cpu_s, 0.0
        ended, replica = self._live.popleft()
        stored = Stored(0, ended.page_keys[-1], self._keys(OUTPUT_PAGES))
        removed = Removed(0, stored.keys[::-1])
        report = self._report(replica, now_s)
        seen = report.num_received
        began_s = time.perf_counter()
        router.ended(ended.number, OUTPUT_PAGES * PAGE_SIZE)
        router.cache_changed(replica, stored, seen)
        if self._num_made % REPORT_EVERY == 0:
            router.report(replica, report, now_s)
        if self._num_made % EVICT_EVERY == 0:
            router.cache_changed(replica, removed, seen)
        return decided_s, cpu_s, time.perf_counter() - began_s

    def _report(self, replica: int, now_s: float) -> LoadReport:
        waiting = self._rng.randrange(8)
        return LoadReport(
            at_s=now_s,
            num_received=max(0, self._router.dispatched(replica) - 1),
            num_waiting=waiting,
            num_running=LIVE_PER_REPLICA,
            waiting_tokens=waiting * PROMPT_TOKENS // 2,
            waiting_prompt_tokens=waiting * PROMPT_TOKENS,
            kv_free_tokens=self._rng.randrange(100_000),
            kv_total_tokens=100_000,
            prefill_rate=8000.0,
            release_rate=2000.0,
        )
