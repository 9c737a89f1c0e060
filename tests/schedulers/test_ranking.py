"""A ranking against a plain dictionary and a sort, whatever is put in and taken out."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers import ranking
from jaxserve.schedulers.ranking import Ranking


@given(
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200),
    most_dead=st.integers(1, 8),
)
def test_a_ranking_is_a_dictionary_in_the_order_of_its_keys(moves, most_dead) -> None:
    ranked, plain = Ranking(), {}
    usual, ranking.MOST_DEAD = ranking.MOST_DEAD, most_dead
    try:
        for put, key in moves:
            if put:
                ranked.put((key,), str(key))
                plain[(key,)] = str(key)
            else:
                assert ranked.pop((key,), None) == plain.pop((key,), None)
            assert ranked == plain and list(ranked.ascending()) == sorted(plain)
            assert not plain or ranked.least() == min(plain)
    finally:
        ranking.MOST_DEAD = usual


def test_a_ranking_of_what_is_sorted() -> None:
    ranked = Ranking.of({1: "a", 3: "b"})
    ranked.put(2, "c")
    assert list(ranked.ascending()) == [1, 2, 3] and ranked.least() == 1


def test_who_is_gone_is_forgotten() -> None:
    ranked: Ranking[int, None] = Ranking()
    for key in range(10_000):
        ranked.put(key, None)
        if key >= 10:
            del ranked[key - 10]
            assert ranked.least() == key - 9
    assert len(ranked._keys) < 200
