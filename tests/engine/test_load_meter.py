"""Load reports: rates are over the window before, and tokens are conserved."""

from jaxserve.engine.load_meter import LoadMeter
from jaxserve.engine.statistics import EngineStatistics
from jaxserve.schedulers.pages import PoolStatistics


def statistics(*, prefill=0, output=0, leased=0):
    pool = PoolStatistics(
        total=10, free=10 - leased, leased=leased, cached=0, retiring=0, evictable=0
    )
    return EngineStatistics(
        waiting=3, waiting_tokens=70, prefill_tokens=prefill, output_tokens=output, pool=pool
    )


def test_the_first_report_has_gauges_and_no_rates():
    report = LoadMeter(page_size=8).report(statistics(leased=4), now_s=5.0, num_received=7)
    assert (report.at_s, report.num_received, report.num_waiting) == (5.0, 7, 3)
    assert report.waiting_tokens == report.waiting_prompt_tokens == 70
    assert (report.kv_free_tokens, report.kv_total_tokens) == (6 * 8, 10 * 8)
    assert report.decode_rate == report.release_rate == 0


def test_rates_are_over_the_last_window():
    meter = LoadMeter(page_size=8)
    meter.report(statistics(output=1000), now_s=0.0, num_received=0)
    meter.report(statistics(output=1010), now_s=1.0, num_received=0)
    report = meter.report(statistics(output=1030, prefill=50), now_s=2.0, num_received=0)
    assert (report.decode_rate, report.prefill_rate) == (20.0, 50.0)
    report = meter.report(statistics(output=1030, prefill=50), now_s=2.5, num_received=0)
    assert report.decode_rate == 20 / 1.5


def test_what_was_written_and_is_not_held_was_released():
    meter = LoadMeter(page_size=8)
    meter.report(statistics(leased=2), now_s=0.0, num_received=0)
    report = meter.report(statistics(prefill=60, output=40, leased=7), now_s=1.0, num_received=0)
    assert report.release_rate == 100 - 5 * 8
