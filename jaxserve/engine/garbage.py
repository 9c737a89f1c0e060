"""The garbage collector of a process that serves: on, but not in the dispatch thread's way."""

import gc
from typing import Final

YOUNG: Final = 50_000
"""Objects that may come into being, beside those that went, until the youngest are walked. A slice
of hundreds of rows makes thousands, most of them gone by its end: with Python's own threshold of
700 several collections fall into each slice, with this one it is one in hundreds of slices, of
twenty milliseconds."""
FULL_AFTER: Final = 1000
"""Collections of the middle generation per full one. A full one walks everything that waits and is
cached, ten milliseconds at ten thousand requests, and finds next to nothing: requests leave no
cycles behind, so that reference counts free them."""


def settle_collector() -> None:
    """To be called once the process is ready to serve.

    Building an engine leaves 300,000 objects that live on; a collection that walks them stops all
    threads for an eighth of a second (measured), so they are walked a last time.
    """
    gc.collect()
    gc.freeze()
    _, middle, _ = gc.get_threshold()
    gc.set_threshold(YOUNG, middle, FULL_AFTER)
