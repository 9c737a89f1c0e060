"""What a replica tells the router of its prefix cache. Knows no time: whoever pulls has it."""

from collections.abc import Sequence

from jaxserve.schedulers.prefix_tree import Cleared, Gap, KvEvent, PrefixTree, Stored


class CacheEvents:
    """Reads a prefix tree's events from the first on."""

    def __init__(self, tree: PrefixTree):
        self._tree = tree
        self._after = 0

    def pull(self) -> Sequence[KvEvent]:
        """All that happened since the last call; where that is not kept, all that is cached."""
        found = self._tree.events_since(self._after)
        if isinstance(found, Gap):
            snapshot = self._tree.snapshot()
            self._after = snapshot.seq
            stored = (Stored(snapshot.seq, parent, (key,)) for parent, key in snapshot.pages)
            return (Cleared(snapshot.seq), *stored)
        if found.events:
            self._after = found.events[-1].seq
        return found.events
