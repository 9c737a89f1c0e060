"""What is known of replicas: no report, however late, loses or doubles what was sent."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.routing import LoadReport, Views

EMPTY = LoadReport(
    at_s=0.0,
    num_received=0,
    num_waiting=0,
    num_running=0,
    waiting_tokens=0,
    waiting_prompt_tokens=0,
    kv_free_tokens=100,
    kv_total_tokens=100,
)


def send(views: Views, replica: int, extend: int, prompt: int | None = None) -> int:
    prompt = extend if prompt is None else prompt
    return views.sent(replica, num_extend_tokens=extend, num_prompt_tokens=prompt)


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 50)),
        st.tuples(st.sampled_from(["receive", "report", "lose"]), st.just(0)),
        st.tuples(st.just("deliver"), st.integers(0, 10)),
    ),
    max_size=60,
)


@given(moves=MOVES)
def test_what_a_report_has_not_seen_is_in_flight_whatever_came_late(moves) -> None:
    """The newest report that came through, and what was sent since it was made, is all there is."""
    views, sent, received, way, newest = Views(1), [], 0, [], EMPTY
    for at_s, (move, value) in enumerate(moves):
        if move == "send":
            sent.append(value)
            assert send(views, 0, value, value + 1) == len(sent)
        elif move == "receive":
            received = min(received + 1, len(sent))
        elif move == "report":
            queued = sum(sent[:received])
            way.append(
                replace(EMPTY, at_s=float(at_s), num_received=received, waiting_tokens=queued)
            )
        elif way and move == "lose":
            way.pop()
        elif way:
            report = way.pop(value % len(way))
            views.report(0, report)
            newest = max(newest, report, key=lambda it: it.at_s)
        unseen = sent[newest.num_received :]
        assert views.in_flight[0] == len(unseen)
        assert views.in_flight_tokens[0] == sum(unseen)
        assert views.in_flight_prompt_tokens[0] == sum(unseen) + len(unseen)
        assert views.waiting_tokens[0] + views.in_flight_tokens[0] == sum(sent)


def test_a_rate_counts_when_work_waited_or_when_it_is_a_new_best() -> None:
    views = Views(1, smoothing=0.5)
    for rate, num_waiting, average in [(0, 0, 0), (10, 0, 10), (20, 0, 15), (5, 0, 15), (5, 3, 10)]:
        at_s = views.now_s = views.now_s + 1
        report = replace(EMPTY, at_s=at_s, num_waiting=num_waiting, prefill_rate=float(rate))
        views.report(0, report)
        assert views.prefill_rate[0] == average


def test_one_that_is_lost_takes_everything_along_and_one_that_joins_has_nothing() -> None:
    views = Views(2)
    send(views, 1, 10)
    views.report(1, replace(EMPTY, at_s=5.0, waiting_tokens=7, kv_free_tokens=40))
    views.lost(1)
    assert list(views.candidates) == [0] and not views.reported[1]
    views.joined(1)
    views.joined(2)
    assert list(views.candidates) == [0, 1, 2] and len(views) == 3
    assert not views.outstanding.any() and not views.in_flight_tokens.any()
    assert not views.waiting_tokens.any() and not views.kv_use.any()
    views.report(1, replace(EMPTY, at_s=1.0, waiting_tokens=3))  # its clock starts anew
    assert views.waiting_tokens[1] == 3 and send(views, 1, 1) == send(views, 2, 1) == 1


@pytest.mark.parametrize(("by_index", "chosen"), [(False, 3), (True, 1)])
def test_of_equals_the_one_with_fewer_requests_or_the_lowest_index(by_index, chosen) -> None:
    views = Views(4)
    send(views, 1, 1)
    views.set_healthy(0, False)
    scores = np.array([0.0, 1.0, 2.0, 1.0])
    assert views.least(scores, by_index=by_index) == chosen
    assert views.least(scores, np.array([1, 2])) == 1
