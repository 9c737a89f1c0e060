"""The numbers of the report on runs whose numbers can be worked out by hand."""

import numpy as np
import pytest

from jaxserve.report.clients import compare, overlap_before
from jaxserve.report.definitions import DISTRIBUTIONS, METRICS
from jaxserve.report.measure import describe, measure, steady_window
from jaxserve.report.options import Limits, MeasureOptions
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import About, Report
from jaxserve.report.request_table import join
from jaxserve.workload.work import Work

WHOLE = (0.0, 10.0)


def send(recorder: Recorder, number: int, at_s: float, *, client="a", prompt=10, weight=1.0):
    work = Work(
        number=number,
        arrival_s=at_s,
        prompt_tokens=prompt,
        output_tokens=9,
        max_tokens=9,
        client=client,
        weight=weight,
    )
    recorder.sent(work, at_s)


def small_run() -> Recorder:
    """Six tokens in three messages, one token, and one request for each other end."""
    recorder = Recorder()
    send(recorder, 0, 0.0)
    for at_s, tokens in ((1.0, 1), (2.0, 4), (3.0, 1)):
        recorder.delivered(0, at_s, tokens)
    recorder.ended(0, 3.0, "stop", 4, queue_s=0.25)
    send(recorder, 1, 1.0, client="b", prompt=30)
    recorder.delivered(1, 4.0, 1)
    recorder.ended(1, 4.0, "length", 6)
    for number, reason in enumerate(("abort", "deadline", "error", "refused"), start=2):
        send(recorder, number, 2.0)
        recorder.ended(number, 5.0, reason, 0)
    send(recorder, 6, 2.0)
    return recorder


def report_on(recorder: Recorder, **options) -> Report:
    options = {"window": WHOLE} | options
    return measure(recorder, About(kind="simulated"), MeasureOptions(**options))


def test_latencies_of_a_small_run():
    report = report_on(small_run())
    assert report.value("ttft_s.mean") == 2.0 and report.distributions["ttft_s"].num == 2
    assert report.value("e2e_s.max") == 3.0
    assert report.value("queue_s.p50") == 0.25
    # (3 - 1) / 5; the request of one token has none
    assert report.value("tpot_s.mean") == 0.4 and report.distributions["tpot_s"].num == 1
    assert report.value("delivery_gap_s.mean") == 1.0
    # a token each after 1 s, three that come with another: 1, 0, 0, 0, 1
    itl = report.distributions["itl_s"]
    assert (itl.num, itl.statistics["mean"], itl.statistics["p50"]) == (5, 0.4, 0.0)
    assert itl.statistics["max"] == 1.0


def test_ends_are_counted_apart():
    numbers = report_on(small_run()).numbers
    assert numbers["requests"] == 7 and numbers["completed"] == 2
    names = ("aborted", "deadline", "errors", "refused", "unfinished")
    assert [numbers[name] for name in names] == [1, 1, 1, 1, 1]


def test_throughput_hit_rate_and_goodput():
    limits = Limits(ttft_s=2.0, tpot_s=0.4, e2e_s=3.0)
    numbers = report_on(small_run(), limits=limits).numbers
    assert numbers["requests_per_s"] == 0.2 and numbers["output_tokens_per_s"] == 0.7
    assert numbers["input_tokens_per_s"] == 4.0 and numbers["total_tokens_per_s"] == 4.7
    assert numbers["hit_rate"] == 10 / 40
    # the first request met all limits; the aborted one asks for nothing
    assert numbers["goodput_share"] == pytest.approx(1 / 6) and numbers["goodput_per_s"] == 0.1
    # a single token has no TPOT that could be too long
    assert report_on(small_run(), limits=Limits(tpot_s=1e-3)).numbers["goodput_per_s"] == 0.1
    assert report_on(small_run()).numbers["goodput_share"] is None


def test_only_the_window_is_measured():
    report = report_on(small_run(), window=(0.5, 3.5))
    assert report.value("ttft_s.mean") == 3.0 and report.numbers["requests"] == 6
    assert report.numbers["output_tokens_per_s"] == 2.0  # 6 tokens in 3 s, whoever was sent when
    assert report.measured["window"] == "0.5 s to 3.5 s of 5 s"


def test_the_steady_window_leaves_out_the_ends():
    recorder = Recorder()
    for number in range(101):
        send(recorder, number, 100.0 + number)
    table = join(recorder)

    def window(**options):
        return steady_window(table, MeasureOptions(**options))

    assert window()[:2] == (110.0, 190.0)
    assert window(warmup_s=30.0)[:2] == (130.0, 190.0)
    assert window(cooldown_s=0.0)[:2] == (110.0, 200.0)
    assert window(window=(1.0, 2.0)) == (1.0, 2.0, "as asked for")
    begin_s, end_s, why = window(warmup_s=200.0)
    assert begin_s == 0.0 and end_s > 200.0 and "leaves nothing" in why
    assert "short" in steady_window(join(small_run()), MeasureOptions())[2]


def test_percentiles_with_zeros_are_those_of_all_values():
    random = np.random.default_rng(0)
    for num, zeros in ((0, 5), (1, 0), (3, 1), (50, 30), (40, 400)):
        values = random.random(num)
        told = describe(values, zeros=zeros)
        assert told is not None
        whole = np.concatenate([np.zeros(zeros), values])
        wanted = [whole.mean(), *np.percentile(whole, (50, 90, 95, 99)), whole.max()]
        assert list(told.statistics.values()) == pytest.approx(wanted, rel=1e-6)
    assert describe(np.zeros(0)) is None


@pytest.mark.parametrize(
    ("shares", "index"), [((1, 1, 1), 1.0), ((3, 0, 0), 1 / 3), ((4, 2, 2), 8 / 9)]
)
def test_jains_index_of_clients_that_all_have_demand(shares, index):
    found = compare(np.array(shares)[:, None] * np.ones((3, 4)), np.ones((3, 4), bool))
    assert found is not None and found.num == 3 and found.share == 1.0
    assert found.jain == pytest.approx(index)
    assert found.gap == 4 * (max(shares) - min(shares))


def test_clients_are_compared_while_all_have_demand():
    # The third wants something in one step of four; the second not in the last, when the first
    # alone is served, which is no injustice.
    demand = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], bool)
    share = np.array([[5.0, 5, 5, 90], [5, 5, 5, 0], [0, 0, 0, 0]])
    found = compare(share, demand)
    assert found is not None
    assert (found.num, found.share, found.jain, found.gap) == (2, 0.75, 1.0, 0.0)
    assert compare(share[:1], demand[:1]) is None
    assert compare(share[:0], demand[:0]) is None


def test_service_both_ways_by_weight_and_the_gap_of_those_backlogged():
    recorder = Recorder()
    for number, client in enumerate("abab"):
        send(recorder, number, 0.0, client=client, weight=2.0 if client == "b" else 1.0)
    for number, tokens in ((0, 10), (1, 40)):
        recorder.delivered(number, 1.0, tokens)
        recorder.ended(number, 1.0, "stop", 4)
    recorder.ended(2, 10.0, "abort", 0)  # both clients have one more that waits to the end
    recorder.ended(3, 10.0, "abort", 0)
    report = report_on(recorder)
    a, b = report.clients
    assert (a["service"], a["service_uncached"]) == (10 + 20, 6 + 20)
    assert (b["service"], b["service_uncached"]) == (10 + 80, 6 + 80)
    assert (a["aborted"], a["completed"], a["demand"], b["weight"]) == (1, 1, 1.0, 2.0)
    shares = (26.0, 43.0)  # by weight
    index = sum(shares) ** 2 / (2 * sum(share**2 for share in shares))
    assert report.numbers["jain_service"] == pytest.approx(index)
    assert report.numbers["jain_backlogged"] == pytest.approx(index)
    assert report.numbers["fleet_gap"] == 43.0 - 26.0
    assert report.numbers["jain_wait"] == 1.0 and report.numbers["jain_wait_clients"] == 2


def test_a_client_may_be_served_in_the_window_without_waiting_in_it():
    recorder = Recorder()
    for number, client in enumerate("ab"):
        send(recorder, number, 0.0, client=client)
        recorder.delivered(number, 1.0, 1)
        recorder.ended(number, 9.0, "stop", 0)
    send(recorder, 2, 5.0, client="a")
    recorder.ended(2, 9.0, "abort", 0)
    report = report_on(recorder, window=(4.0, 8.0))
    assert [row["client"] for row in report.clients] == ["a", "b"]
    assert report.numbers["jain_backlogged"] is None  # one alone waited


def test_one_client_has_no_index():
    numbers = report_on(small_run()).numbers
    assert numbers["jain_backlogged"] is None and numbers["jain_backlogged_clients"] is None
    recorder = Recorder()
    send(recorder, 0, 0.0)
    numbers = report_on(recorder).numbers
    assert numbers["jain_service"] is None and numbers["jain_wait"] is None


def test_time_in_the_system_is_exact():
    begin, end = np.array([0.0, 1.0, 4.0]), np.array([2.0, 3.0, np.inf])
    found = np.diff(overlap_before(begin, end, np.array([0.0, 1, 2, 3, 4, 6])))
    assert found == pytest.approx([1, 2, 1, 0, 2])


def test_load_and_device_are_of_all_slices():
    recorder = small_run()
    for replica, end_s in ((0, 4.0), (1, 2.0)):
        recorder.slice(
            replica,
            0.0,
            end_s,
            steps=8,
            rows=2 + replica,
            prefill_tokens=10,
            output_tokens=10 - 10 * replica,
            pad_tokens=3,
            invalid_tokens=1,
        )
    recorder.replica(0, {"preemptions": 2.0})
    recorder.fairness(1, 3.0, clients=2, window_s=1.0, gap=8.0, bound=10.0, jain=0.9)
    recorder.fairness(1, 4.0, clients=2, window_s=3.0, gap=2.0, bound=None, jain=0.5)
    report = report_on(recorder)
    wanted = {
        "replicas": 2,
        "utilisation": 0.6,
        "ct_std_s": 1.0,
        "busy_cv": 1 / 3,
        "busy_max_over_mean": 4 / 3,
        "tokens_cv": 1 / 3,
        "slices": 2,
        "slice_steps": 8,
        "slice_rows": 2.5,
        "slice_s": 3.0,
        "slice_max_s": 4.0,
        "preemptions": 2,
        "pad_tokens": 6,
        "invalid_tokens": 2,
        "service_gap": 8.0,
        "service_gap_bound": 10.0,
        "gap_over_bound": 0.8,
        "order_jain": 0.6,
    }
    assert {name: report.numbers[name] for name in wanted} == pytest.approx(wanted)
    assert report.replicas[1]["gap"] == 8.0 and report.replicas[0]["preemptions"] == 2


def test_every_number_of_a_report_is_defined(report):
    assert set(report.numbers) | set(report.distributions) == set(METRICS)
    assert set(report.distributions) == {metric.name for metric in DISTRIBUTIONS}
    assert all(row.keys() == report.clients[0].keys() for row in report.clients)


def test_an_empty_run_has_a_report():
    report = measure(Recorder(), About(kind="live"))
    assert report.numbers["requests"] == 0 and not report.distributions and not report.clients
