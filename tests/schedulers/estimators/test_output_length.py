"""How long outputs get, judged by those that ended."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.estimators.output_length import ClientHistory, Constant


def history(*, hist: int = 8, u: float = 0.5, min_samples: int = 2) -> ClientHistory:
    return ClientHistory(hist=hist, u=u, min_samples=min_samples, otherwise=Constant(0))


def test_a_constant_holds_until_it_is_made() -> None:
    assert [Constant(9).expected("a", made, 50) for made in (0, 8, 9, 30)] == [9, 9, 50, 50]
    assert Constant(9).expected("a", 0, 5) == 5
    assert Constant(0).expected("a", 0, 50) == 50


@given(
    outputs=st.lists(st.integers(1, 60), max_size=30),
    hist=st.integers(1, 10),
    u=st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0]),
    made=st.integers(0, 60),
)
def test_a_quantile_of_the_last_outputs_beyond_what_is_made(outputs, hist, u, made) -> None:
    lengths = history(hist=hist, u=u)
    for output in outputs:
        lengths.finished("a", output)
    beyond = sorted(output for output in outputs[-hist:] if output > made)
    found = lengths.expected("a", made, 100)
    if not beyond:
        assert found == 100
        return
    # The least that a share u of them do not exceed.
    assert found in beyond and sum(output <= found for output in beyond) >= u * len(beyond)
    assert sum(output < found for output in beyond) < u * len(beyond)


def test_what_it_may_make_caps_what_is_expected() -> None:
    lengths = history()
    for _ in range(2):
        lengths.finished("a", 40)
    assert lengths.expected("a", 0, 30) == 30


def test_all_clients_stand_in_for_one_that_is_little_known() -> None:
    lengths = history(min_samples=2)
    for client, output in (("a", 10), ("a", 10), ("b", 30)):
        lengths.finished(client, output)
    assert lengths.expected("a", 0, 99) == 10
    assert lengths.expected("a", 10, 99) == 30  # it outlasted all of its own
    assert lengths.expected("b", 0, 99) == lengths.expected("c", 0, 99) == 10
