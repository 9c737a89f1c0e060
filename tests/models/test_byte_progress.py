"""Lines of progress: large models have a first and a last one, small ones none."""

import re

from jaxserve.models.byte_progress import LARGE_BYTES, byte_progress


def lines(total: int, verb: str = "loading") -> list[str]:
    said: list[str] = []
    progress = byte_progress(said.append, verb=verb)
    for done in (0, total // 2, total):
        progress(done, total)
    return said


def test_a_large_model_has_a_first_and_a_last_line() -> None:
    first, last = lines(LARGE_BYTES, "reading")
    assert first == "reading 0/500 MB"
    assert re.fullmatch(r"reading 500/500 MB, \d+\.\d\d GB/s", last)


def test_a_small_model_that_is_fast_has_none() -> None:
    assert lines(LARGE_BYTES - 1) == []
