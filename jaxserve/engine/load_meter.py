"""Load reports of a replica: gauges of now, and rates over the last second or so. Knows no stream
and no clock."""

from typing import Final

from jaxserve.engine.statistics import EngineStatistics
from jaxserve.schedulers.pages import PoolStatistics
from jaxserve.schedulers.routing import LoadReport

WINDOW_S: Final = 1.0

_Mark = tuple[float, int, int, int]
"""A time, and then: prompt tokens computed so far, output tokens so far, pages leased."""


class LoadMeter:
    """Turns counters into reports. A rate counts from a mark at least `WINDOW_S` old, if any."""

    def __init__(self, *, page_size: int):
        self._page_size = page_size
        self._marks: list[_Mark] = []

    def report(
        self,
        statistics: EngineStatistics,
        pool: PoolStatistics,
        *,
        num_running: int,
        now_s: float,
        num_received: int,
    ) -> LoadReport:
        """`num_received` requests had reached the replica by now. What waits counts with all its
        prompt tokens: how many are cached is known when it is let in. Of `statistics` counters
        alone are read, so that they need no snapshot, which takes longer than the rest."""
        size = self._page_size
        mark = (now_s, statistics.prefill_tokens, statistics.output_tokens, pool.leased)
        then_s, prefill, output, leased = self._since(mark)
        passed_s = now_s - then_s

        def rate(tokens: int) -> float:
            return tokens / passed_s if passed_s > 0 else 0.0

        computed, made = statistics.prefill_tokens - prefill, statistics.output_tokens - output
        # What was written and is not held any more was released: tokens are conserved, up to the
        # unused ends of pages.
        released = computed + made - (pool.leased - leased) * size
        return LoadReport(
            at_s=now_s,
            num_received=num_received,
            num_waiting=statistics.waiting,
            num_running=num_running,
            waiting_tokens=statistics.waiting_tokens,
            waiting_prompt_tokens=statistics.waiting_tokens,
            kv_free_tokens=(pool.free + pool.evictable) * size,
            kv_total_tokens=pool.total * size,
            prefill_rate=rate(computed),
            release_rate=max(0.0, rate(released)),
            decode_rate=rate(made),
        )

    def _since(self, mark: _Mark) -> _Mark:
        """The youngest mark that is a window old, else the oldest; marks older than it go."""
        self._marks.append(mark)
        old = [place for place, (at_s, *_) in enumerate(self._marks) if at_s <= mark[0] - WINDOW_S]
        del self._marks[: old[-1] if old else 0]
        return self._marks[0]
