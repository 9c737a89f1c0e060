"""Lines that tell a person how far the reading of a model is, in bytes and bytes per second."""

import time
from collections.abc import Callable
from typing import Final

LARGE_BYTES: Final = 500_000_000
"""A model from here on gets a first and a last line, however fast it is."""

_LINE_EVERY_S: Final = 1.0


def byte_progress(
    say: Callable[[str], None], *, verb: str = "loading"
) -> Callable[[int, int], None]:
    """A function of bytes done and in all; it says lines like "loading 900/2200 MB, 1.10 GB/s".

    One comes every second, and for a large model at the start and at the end.
    """
    started_s = said_s = time.monotonic()

    def take(done: int, total: int) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        at_an_end = done in (0, total) and total >= LARGE_BYTES
        if now_s - said_s < _LINE_EVERY_S and not at_an_end:
            return
        said_s = now_s
        line = f"{verb} {done / 1e6:.0f}/{total / 1e6:.0f} MB"
        say(f"{line}, {done / (now_s - started_s) / 1e9:.2f} GB/s" if done else line)

    return take
