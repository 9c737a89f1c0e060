"""Load reports: gauges of now, and rates over the last second or so. Knows no stream."""

from typing import TYPE_CHECKING, Final

from jaxserve.proto import jaxserve_v1_pb2 as pb

if TYPE_CHECKING:
    from jaxserve.engine.statistics import EngineStatistics

WINDOW_S: Final = 1.0


class LoadMeter:
    """Turns statistics into reports. A rate counts from a mark at least `WINDOW_S` old, if any."""

    def __init__(self, replica: str, *, page_size: int):
        self._replica = replica
        self._page_size = page_size
        self._marks: list[tuple[float, dict[str, float]]] = []

    def report(self, statistics: "EngineStatistics", *, now_s: float) -> pb.LoadReport:
        values = statistics.values()
        then_s, then = self._mark(now_s, values)
        passed_s = now_s - then_s

        def rate(name: str) -> float:
            return (values[name] - then[name]) / passed_s if passed_s > 0 else 0.0

        # What was written and is not held any more was released: tokens are conserved, up to the
        # unused ends of pages.
        growth = (values["pool_leased"] - then["pool_leased"]) * self._page_size
        growth_per_s = growth / passed_s if passed_s > 0 else 0.0
        written_per_s = rate("prefill_tokens") + rate("output_tokens")
        return pb.LoadReport(
            replica=self._replica,
            at_s=now_s,
            num_waiting=int(values["waiting"]),
            num_waiting_uncached_tokens=int(values["waiting_tokens"]),
            num_running=int(values["running"]),
            kv_pages_free=int(values["pool_free"]),
            kv_pages_cached=int(values["pool_cached"]),
            kv_pages_total=int(values["pool_total"]),
            prefill_tokens_per_s=rate("prefill_tokens"),
            decode_tokens_per_s=rate("output_tokens"),
            kv_release_tokens_per_s=max(0.0, written_per_s - growth_per_s),
        )

    def _mark(self, now_s: float, values: dict[str, float]) -> tuple[float, dict[str, float]]:
        """The youngest mark that is a window old, else the oldest; marks older than it go."""
        self._marks.append((now_s, values))
        old = [place for place, (at_s, _) in enumerate(self._marks) if at_s <= now_s - WINDOW_S]
        del self._marks[: old[-1] if old else 0]
        return self._marks[0]
