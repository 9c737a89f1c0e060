"""Who is next, and who gives way."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.catalog import ORDERS, make_order
from jaxserve.schedulers.events import Abort, Admit, Arrive, Enact, Finish, Preempt


def arrive(number: int, priority: int = 0) -> Arrive:
    return Arrive(number, "client", priority, 0.0, 10, 10, 1)


def test_a_preempted_request_takes_its_old_place() -> None:
    order = make_order("fcfs", page_size=16)
    for number in (1, 2, 3):
        order.on(arrive(number))
    order.on(Admit(1, 10))
    order.on(Preempt(1))
    assert list(order.waiting()) == [1, 2, 3] and order.running() == []


def test_priority_is_smaller_first_then_arrival() -> None:
    order = make_order("priority", page_size=16)
    for number, priority in ((1, 5), (2, -1), (3, 5), (4, -1)):
        order.on(arrive(number, priority))
    assert list(order.waiting()) == [2, 4, 1, 3]
    for number in (1, 2, 3):
        order.on(Admit(number, 10))
    assert order.running() == [2, 1, 3]  # victims are taken from the end


@given(
    moves=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(-2, 2)), max_size=60)
)
def test_everybody_is_in_one_place_and_aborts_leave_no_trace(moves) -> None:
    for name in ORDERS:
        order, waiting, running, next_number = make_order(name, page_size=16), set(), set(), 1
        for kind, pick, priority in moves:
            if kind == 0:
                order.on(arrive(next_number, priority))
                waiting.add(next_number)
                next_number += 1
            elif kind == 1 and waiting:
                number = sorted(waiting)[pick % len(waiting)]
                order.on(Admit(number, 1))
                waiting.remove(number)
                running.add(number)
            elif kind == 2 and running:
                number = sorted(running)[pick % len(running)]
                order.on(Preempt(number))
                running.remove(number)
                waiting.add(number)
            elif kind == 3 and running:
                number = sorted(running)[pick % len(running)]
                order.on(Enact([(number, 3, 4)]))
            elif kind == 4 and running:
                number = sorted(running)[pick % len(running)]
                order.on(Finish(number))
                running.remove(number)
            elif kind == 5 and waiting | running:
                number = sorted(waiting | running)[pick % len(waiting | running)]
                order.on(Abort(number))
                waiting.discard(number)
                running.discard(number)
            assert set(order.waiting()) == waiting and set(order.running()) == running
