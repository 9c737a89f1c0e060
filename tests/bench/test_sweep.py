"""The rate sweep and repeats by arithmetic: queues whose knee is known, runs whose mean is."""

import asyncio
import math

import pytest

from jaxserve.bench.repeats import interval, repeat_table, run_numbers
from jaxserve.bench.sweep import Point, find_knee, judge, meets
from jaxserve.bench.tally import Tally
from jaxserve.bench.transport import Ending
from jaxserve.report.measure import MeasureOptions, measure
from jaxserve.report.options import Limits
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import About
from jaxserve.workload.work import Work

SERVICE_S, TOKENS, WARM_UP_S, WINDOW_S = 0.05, 2, 1.0, 10.0


def serve_at(rate: float) -> Tally:
    """One server, 50 ms a request, requests at even distances: its knee is 20 requests/s. One
    token comes at half of a request's service, one at its end."""
    tally, free_s = Tally(warm_up_s=WARM_UP_S), 0.0
    for number in range(int(rate * (WARM_UP_S + WINDOW_S))):
        due_s = number / rate
        work = Work(
            number=number,
            arrival_s=due_s,
            prompt_tokens=1,
            output_tokens=TOKENS,
            max_tokens=TOKENS,
        )
        begun_s = max(due_s, free_s)
        free_s = begun_s + SERVICE_S
        tally.sent(work, due_s, 0.0)
        for token in range(TOKENS):
            tally.delivered(number, begun_s + SERVICE_S * (token + 1) / TOKENS, 1)
        tally.ended(number, free_s, Ending(reason="length"))
    tally.close(free_s)
    return tally


def sweep(limits: Limits, **options):
    rates = []

    async def measure(rate: float) -> Point | None:
        rates.append(rate)
        until_s = WARM_UP_S + WINDOW_S
        return judge(serve_at(rate), rate=rate, until_s=until_s, limits=limits, share=0.95)

    values = {"least": 2.0, "most": 200.0, "tolerance": 0.02} | options
    return asyncio.run(find_knee(measure, **values)), rates


def test_without_limits_the_knee_is_where_the_queue_begins():
    swept, rates = sweep(Limits())
    assert rates[:5] == [2.0, 4.0, 8.0, 16.0, 32.0] and len(rates) < 15
    assert swept.bounded and swept.knee is not None
    assert swept.knee.rate == pytest.approx(20.0, rel=0.04)
    assert [point.rate for point in swept.points] == sorted(rates)
    table = "\n".join(swept.table())
    assert "knee: " in table and "yes*" in table
    assert len(swept.as_json()["points"]) == len(rates)


def test_with_limits_the_knee_is_where_the_share_is_met():
    """Above 20/s the wait grows by 1 - 20 / rate seconds a second. At the knee it takes all but 5 %
    of the window to reach the limit: (1 + 0.95 * 10) * (1 - 20 / rate) = 0.5 s."""
    swept, _ = sweep(Limits(ttft_s=0.5 + SERVICE_S / TOKENS))
    assert swept.knee is not None
    assert swept.knee.rate == pytest.approx(20 / (1 - 0.5 / 10.5), rel=0.03)


def test_a_knee_beyond_the_rates_tried_and_none_at_all():
    swept, rates = sweep(Limits(), most=15.0)
    assert swept.knee is not None and swept.knee.rate == 15.0 == rates[-1] and not swept.bounded
    assert "or more: no rate tried was too much" in swept.verdict()
    swept, rates = sweep(Limits(), least=100.0)
    assert swept.knee is None and rates == [100.0]
    assert swept.verdict() == "no knee: already 100 requests/s were too much"


def test_a_sweep_cut_short_says_what_it_has():
    async def measure(rate: float) -> Point | None:
        if rate > 10:
            return None
        tally = serve_at(rate)
        return judge(tally, rate=rate, until_s=11.0, limits=Limits(), share=0.95)

    swept = asyncio.run(find_knee(measure, least=4.0, most=100.0))
    assert len(swept.points) == 2 and swept.knee is not None and swept.knee.rate == 8.0


def test_failed_answers_meet_no_limit():
    tally = serve_at(10.0)
    row = tally.rows[100]
    assert meets(row, Limits()) and meets(row, Limits(e2e_s=0.051, tpot_s=0.026))
    assert not meets(row, Limits(tpot_s=0.024))
    row.reason = "refused"
    assert not meets(row, Limits())


def test_lateness_beyond_the_bound_is_warned_of():
    tally = Tally()
    work = Work(number=0, arrival_s=0.0, prompt_tokens=1, output_tokens=1, max_tokens=1)
    tally.sent(work, 0.0, 0.001)
    assert not any("warning" in line for line in tally.closing_lines("x"))
    for _ in range(50):
        tally.sent(work, 0.0, 0.02)
    assert any("warning: the client itself was late" in line for line in tally.closing_lines("x"))


def test_repeats_give_mean_and_interval():
    mean, half = interval([10.0, 12.0, 14.0])
    assert mean == 12.0 and half == pytest.approx(4.303 * 2.0 / math.sqrt(3))
    assert interval([5.0]) == (5.0, math.inf)
    recorder = Recorder()
    for row in serve_at(10.0).rows.values():
        recorder.sent(row.work, row.due_s)
        recorder.delivered(row.work.number, row.first_s, 1)
        recorder.delivered(row.work.number, row.last_s, 1)
        recorder.ended(row.work.number, row.ended_s, row.reason, 0)
    limits = MeasureOptions(limits=Limits(ttft_s=1.0))
    numbers = run_numbers(measure(recorder, About(kind="live"), limits))
    assert numbers["tpot_s mean"] == pytest.approx(0.025) and numbers["goodput_share"] == 1.0
    assert numbers["ttft_s p99"] == pytest.approx(0.025)
    lines = list(repeat_table([numbers, numbers]))
    assert len(lines) == 1 + len(numbers)
