"""Load reports: rates are over the window before, and tokens are conserved."""

from jaxserve.engine.statistics import EngineStatistics
from jaxserve.schedulers.pages import PoolStatistics
from jaxserve.server.load import LoadMeter


def statistics(*, prefill=0, output=0, leased=0):
    pool = PoolStatistics(
        total=10, free=10 - leased, leased=leased, cached=0, retiring=0, evictable=0
    )
    return EngineStatistics(
        waiting=3, waiting_tokens=70, prefill_tokens=prefill, output_tokens=output, pool=pool
    )


def test_the_first_report_has_gauges_and_no_rates():
    report = LoadMeter("r", page_size=8).report(statistics(leased=4), now_s=5.0)
    assert (report.replica, report.at_s, report.num_waiting) == ("r", 5.0, 3)
    assert report.num_waiting_uncached_tokens == 70
    assert (report.kv_pages_free, report.kv_pages_total) == (6, 10)
    assert report.decode_tokens_per_s == report.kv_release_tokens_per_s == 0


def test_rates_are_over_the_last_window():
    meter = LoadMeter("r", page_size=8)
    meter.report(statistics(output=1000), now_s=0.0)
    meter.report(statistics(output=1010), now_s=1.0)
    report = meter.report(statistics(output=1030, prefill=50), now_s=2.0)
    assert (report.decode_tokens_per_s, report.prefill_tokens_per_s) == (20.0, 50.0)
    report = meter.report(statistics(output=1030, prefill=50), now_s=2.5)
    assert report.decode_tokens_per_s == 20 / 1.5


def test_what_was_written_and_is_not_held_was_released():
    meter = LoadMeter("r", page_size=8)
    meter.report(statistics(leased=2), now_s=0.0)
    report = meter.report(statistics(prefill=60, output=40, leased=7), now_s=1.0)
    assert report.kv_release_tokens_per_s == 100 - 5 * 8
