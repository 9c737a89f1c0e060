"""The garbage collector of a process that serves: on, but not in the dispatch thread's way."""

import gc
from typing import Final

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
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_AFTER)
