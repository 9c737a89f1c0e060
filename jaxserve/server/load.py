"""Load reports as messages. Knows no stream."""

from typing import TYPE_CHECKING

from jaxserve.proto import jaxserve_v1_pb2 as pb

if TYPE_CHECKING:
    from jaxserve.engine.statistics import EngineStatistics
    from jaxserve.schedulers.routing import LoadReport


def load_to_proto(
    report: "LoadReport", statistics: "EngineStatistics", *, replica: str, draining: bool
) -> pb.LoadReport:
    """A report, and the pages it was made from."""
    pool = statistics.pool
    assert pool is not None, "statistics of a core have its pool's"
    return pb.LoadReport(
        replica=replica,
        at_s=report.at_s,
        dispatches_received=report.num_received,
        num_waiting=report.num_waiting,
        num_waiting_uncached_tokens=report.waiting_tokens,
        num_running=report.num_running,
        kv_pages_free=pool.free,
        kv_pages_cached=pool.cached,
        kv_pages_total=pool.total,
        prefill_tokens_per_s=report.prefill_rate,
        decode_tokens_per_s=report.decode_rate,
        kv_release_tokens_per_s=report.release_rate,
        draining=draining,
    )
