from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server.stop_strings import Match, StopMatcher

LETTERS = st.text("ab.", max_size=30)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, stops: list[str], armed_from: int = 0) -> tuple[int, str] | None:
    """The plain definition: the first place where any stop string ends, and the longest there."""
    for end in range(armed_from + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 6), max_size=10))
def test_any_slices_find_the_same_match_and_the_same_text(text, stops, cuts):
    matcher, out, start, found = StopMatcher(stops), "", 0, None
    for cut in [*cuts, len(text)]:
        certain, match = matcher.feed(text[start : start + cut])
        out += certain
        if match is not None:
            found = (start + match.end, match.stop)
            break
        assert text[: start + cut] == out + text[len(out) : start + cut]
        assert len(out) + matcher.num_held == min(start + cut, len(text))
        start = min(start + cut, len(text))
    expected = first_match(text, stops)
    assert found == expected
    if expected is None:
        assert out + matcher.flush() == text
    else:
        end, stop = expected
        assert out == text[: end - len(stop)] and matcher.num_held == 0


@given(text=LETTERS, stops=STOPS, split=st.integers(0, 30))
def test_matches_that_end_before_min_tokens_do_not_count_but_may_begin_there(text, stops, split):
    split = min(split, len(text))
    matcher = StopMatcher(stops)
    head, none = matcher.feed(text[:split], armed=False)
    assert none is None
    tail, match = matcher.feed(text[split:])
    expected = first_match(text, stops, armed_from=split)
    assert (None if match is None else (split + match.end, match.stop)) == expected
    if expected is not None:
        assert head + tail == text[: expected[0] - len(expected[1])]


@given(text=LETTERS, stops=STOPS)
def test_only_what_may_become_a_match_is_held(text, stops):
    matcher = StopMatcher(stops)
    certain, match = matcher.feed(text)
    if match is None and matcher.num_held:
        held = text[len(certain) :]
        assert any(stop.startswith(held) and stop != held for stop in stops)


def test_the_earliest_end_wins_then_the_longest():
    assert StopMatcher(["bcd", "c"]).feed("abcd") == ("ab", Match("c", 3))
    assert StopMatcher(["c", "bc"]).feed("abcd") == ("a", Match("bc", 3))
