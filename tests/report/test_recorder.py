"""What is recorded comes back whole, in columns of a size that does not run away."""

import numpy as np
import pytest

from jaxserve.report import fairness_log, slice_log
from jaxserve.report import recorder as recorder_module
from jaxserve.report.fairness_log import FairnessLog
from jaxserve.report.recorder import Recorder
from jaxserve.report.request_table import join
from jaxserve.report.slice_log import SliceLog
from jaxserve.workload.work import Work


def work(number: int, client: str = "a") -> Work:
    return Work(
        number=number,
        arrival_s=0.0,
        prompt_tokens=5,
        output_tokens=3,
        max_tokens=3,
        client=client,
    )


def test_deliveries_come_back_request_by_request(monkeypatch):
    monkeypatch.setattr(recorder_module, "_PENDING", 9)  # lists fill up in between
    recorder = Recorder()
    for number in (7, 3):
        recorder.sent(work(number), 0.25)
    for at_s in range(1, 6):
        recorder.delivered(7, at_s + 0.000_001, at_s)
        recorder.delivered(3, float(at_s), 100_000)
    recorder.ended(3, 6.0, "length", 2, replica=1, queue_s=0.5)
    table = join(recorder)
    assert table.number_R.tolist() == [3, 7]
    assert table.request_M.tolist() == [0] * 5 + [1] * 5
    assert table.tokens_M[5:].tolist() == [1, 2, 3, 4, 5] and table.output_R[0] == 500_000
    assert table.time_M[5:] == pytest.approx([at_s + 1e-6 for at_s in range(1, 6)], abs=1e-7)
    assert np.isnan(table.gap_M[[0, 5]]).all() and table.gap_M[1:5] == pytest.approx([1.0] * 4)
    assert table.replica_R.tolist() == [1, -1] and table.cached_R.tolist() == [2, 0]
    assert recorder.ends == [(3, 6.0, "length")]


def test_what_was_never_sent_is_left_out_and_counted():
    recorder = Recorder()
    recorder.sent(work(1), 0.0)
    recorder.delivered(0, 1.0, 1)
    recorder.delivered(1, 2.0, 1)
    recorder.ended(2, 3.0, "stop", 0)
    table = join(recorder)
    assert (len(table), table.num_strange, table.output_R.tolist()) == (1, 2, [1])
    assert len(join(Recorder())) == 0


def test_an_unknown_reason_is_refused():
    with pytest.raises(ValueError):
        Recorder().ended(0, 0.0, "tired", 0)


def test_busy_time_is_kept_when_bins_grow():
    log = SliceLog(keep=10)
    random = np.random.default_rng(0)
    total_s = np.zeros(3)
    for batch in range(4):
        for _ in range(50):
            replica, begin_s = int(random.integers(3)), float(random.random() * 10**batch)
            end_s = begin_s + float(random.random() * 2)
            log.add((replica, begin_s, end_s, 4, 2, 1, 8, 3, 1))
            total_s[replica] += end_s - begin_s
        log.flush()
    assert log.busy_share.sum(axis=1) * log.bin_s == pytest.approx(total_s)
    assert log.busy_share.shape[1] <= slice_log.NUM_BINS
    assert log.totals["busy_s"] == pytest.approx(total_s)
    assert log.totals["slices"].sum() == log.num_slices == log.by_steps[4] == 200
    assert log.totals["row_steps"].sum() == 200 * 8 and log.by_seconds.sum() == 200
    assert len(log.kept["replica"]) == 10


def test_the_largest_gap_is_never_thinned_out(monkeypatch):
    monkeypatch.setattr(fairness_log, "MOST_SAMPLES", 50)
    log = FairnessLog()
    for place in range(999):
        gap = 77.0 if place == 500 else float(place % 7)
        log.add(place % 3, float(place), 2, 1.0, gap, None if place % 2 else 100.0, 0.5)
    log.add(0, 999.0, 1, 5.0, 1e9, None, 1.0)  # alone: nobody to be compared with
    assert log.thinned and len(log.samples()) <= 50
    assert 77.0 in log.samples()[:, 2]
    worst = log.worst[500 % 3]
    assert (worst.gap, worst.bound, worst.at_s, worst.over_bound) == (77.0, 100.0, 500.0, 0.77)
    assert worst.jain == 0.5
