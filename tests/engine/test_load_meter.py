"""Load reports: rates are over the window before, and tokens are conserved."""

from jaxserve.engine.load_meter import LoadMeter
from jaxserve.engine.statistics import EngineStatistics
from jaxserve.schedulers.pages import PoolStatistics


def report(meter, *, now_s, num_received=0, prefill=0, output=0, leased=0):
    pool = PoolStatistics(
        total=10, free=10 - leased, leased=leased, cached=0, retiring=0, evictable=0
    )
    counters = EngineStatistics(
        waiting=3, waiting_tokens=70, prefill_tokens=prefill, output_tokens=output
    )
    return meter.report(counters, pool, num_running=2, now_s=now_s, num_received=num_received)


def test_the_first_report_has_gauges_and_no_rates():
    first = report(LoadMeter(page_size=8), leased=4, now_s=5.0, num_received=7)
    assert (first.at_s, first.num_received) == (5.0, 7)
    assert (first.num_waiting, first.num_running) == (3, 2)
    assert first.waiting_tokens == first.waiting_prompt_tokens == 70
    assert (first.kv_free_tokens, first.kv_total_tokens) == (6 * 8, 10 * 8)
    assert first.decode_rate == first.release_rate == 0


def test_rates_are_over_the_last_window():
    meter = LoadMeter(page_size=8)
    report(meter, output=1000, now_s=0.0)
    report(meter, output=1010, now_s=1.0)
    third = report(meter, output=1030, prefill=50, now_s=2.0)
    assert (third.decode_rate, third.prefill_rate) == (20.0, 50.0)
    assert report(meter, output=1030, prefill=50, now_s=2.5).decode_rate == 20 / 1.5


def test_what_was_written_and_is_not_held_was_released():
    meter = LoadMeter(page_size=8)
    report(meter, leased=2, now_s=0.0)
    second = report(meter, prefill=60, output=40, leased=7, now_s=1.0)
    assert second.release_rate == 100 - 5 * 8
