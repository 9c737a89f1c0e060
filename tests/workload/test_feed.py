"""A feed gives out each request once, when it is due and not before."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work, Workload

SPECS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 4.0]),
        st.sampled_from("ab"),
        st.sampled_from([None, "s", "t", "u"]),
        st.sampled_from([None, 0.0, 2.0]),
    ),
    min_size=1,
    max_size=25,
)
"""Gap, client, session and think time of each request."""


def made(specs: Sequence[tuple[float, str, str | None, float | None]]) -> Workload:
    works, at_s = [], 0.0
    for number, (gap_s, client, session, think_s) in enumerate(specs):
        at_s += gap_s
        works.append(
            Work(
                number=number,
                arrival_s=at_s,
                prompt_tokens=1,
                output_tokens=1,
                max_tokens=1,
                client=client,
                session=session,
                think_s=think_s,
            )
        )
    return workload_of(works)


def workload_of(works: Sequence[Work]) -> Workload:
    return Workload(name="test", requests=lambda: iter(works), num_requests=len(works))


class Run:
    """Drives a feed; each request takes as long as `takes_s` says."""

    def __init__(self, feed: Feed, takes_s: Callable[[Work], float]):
        self.sent: list[tuple[float, Work]] = []
        self.ended_s: dict[int, float] = {}
        self.most_running: Counter[str] = Counter()
        self.most = 0
        running: Counter[str] = Counter()
        ends: list[tuple[float, int, Work]] = []
        while not feed.finished or ends:
            next_s = feed.next_s()
            if ends and (next_s is None or ends[0][0] <= next_s):
                now_s, _, work = heapq.heappop(ends)
                running[work.client] -= 1
                self.ended_s[work.number] = now_s
                feed.ended(work, now_s)
                continue
            assert next_s is not None, "nothing runs, and nothing is due"
            assert feed.take(next_s - 1e-6) == []
            taken = feed.take(next_s)
            assert taken and [due for due, _ in taken] == sorted(due for due, _ in taken)
            for due_s, work in taken:
                assert due_s <= next_s
                self.sent.append((due_s, work))
                running[work.client] += 1
                heapq.heappush(ends, (due_s + takes_s(work), work.number, work))
            self.most = max(self.most, running.total())
            for client in running:
                self.most_running[client] = max(self.most_running[client], running[client])
        assert feed.next_s() is None


TIMES = st.lists(st.sampled_from([0.1, 1.0, 3.0]), min_size=25, max_size=25)


@given(SPECS, TIMES)
def test_an_open_loop_sends_each_request_at_its_arrival(specs, times_s) -> None:
    workload = made(specs)
    run = Run(Feed(workload), lambda work: times_s[work.number])
    assert run.sent == [(work.arrival_s, work) for work in workload.requests()]


@given(SPECS, TIMES, st.integers(1, 4), st.booleans())
def test_a_closed_loop_keeps_so_many_under_way_and_no_more(
    specs, times_s, concurrency: int, per_client: bool
) -> None:
    workload = made(specs)
    feed = Feed(workload, loop="closed", concurrency=concurrency, per_client=per_client)
    run = Run(feed, lambda work: times_s[work.number])
    numbers = [work.number for _, work in run.sent]
    assert sorted(numbers) == list(range(workload.num_requests))
    has = Counter(work.client for work in workload.requests())
    if per_client:
        assert run.most_running == {client: min(concurrency, has[client]) for client in has}
        for client in has:
            sent = [work.number for _, work in run.sent if work.client == client]
            assert sent == sorted(sent)
    else:
        assert run.most == min(concurrency, workload.num_requests)
        assert numbers == sorted(numbers)
    # Whoever is not among the first is sent the moment that another ends.
    assert {due_s for due_s, _ in run.sent} <= {0.0, *run.ended_s.values()}


@given(SPECS, TIMES)
def test_a_session_waits_for_its_answer_and_then_thinks(specs, times_s) -> None:
    workload = made(specs)
    run = Run(Feed(workload, loop="sessions"), lambda work: times_s[work.number])
    assert Counter(w.number for _, w in run.sent) == Counter(range(workload.num_requests))
    turns = defaultdict(list)
    for due_s, work in run.sent:
        if work.session is None:
            assert due_s == work.arrival_s
        else:
            turns[work.session].append((due_s, work))
    for session in turns.values():
        first_s, first = session[0]
        assert first_s == first.arrival_s
        for (_, before), (due_s, work) in zip(session, session[1:], strict=False):
            assert work.number > before.number
            assert due_s == run.ended_s[before.number] + (work.think_s or 0.0)


def test_sessions_are_read_only_as_far_as_needed() -> None:
    """A million requests are not held: what is not due is not read, but for the turn looked for."""
    read = []

    def requests():
        for number in range(1000):
            read.append(number)
            yield Work(
                number=number,
                arrival_s=float(number),
                prompt_tokens=1,
                output_tokens=1,
                max_tokens=1,
                session=f"s{number // 2}",
            )

    feed = Feed(Workload(name="w", requests=requests, num_requests=1000), loop="sessions")
    read.clear()  # turns were counted
    ((_, first),) = feed.take(0.0)
    feed.ended(first, 0.5)
    assert feed.next_s() == 0.5 and len(read) <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loop": "round"}, "loop: got 'round'; allowed: open, closed, sessions"),
        ({"loop": "closed"}, "concurrency: got 0; allowed: 1 or more with loop=closed"),
        ({"concurrency": 4}, "concurrency: got 4; allowed: unset with loop=open"),
        ({"per_client": True}, "per_client: got True; allowed: unset unless loop=closed"),
    ],
)
def test_contradictions_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Feed(workload_of([]), **settings)
