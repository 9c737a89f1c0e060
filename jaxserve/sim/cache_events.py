"""What a replica tells the router of its prefix cache. Knows no time: whoever pulls has it."""

from collections.abc import Sequence

from jaxserve.schedulers.prefix_tree import KvEvent, PrefixTree


class CacheEvents:
    """Hears what happens to a prefix tree, beside whoever hears of it already."""

    def __init__(self, tree: PrefixTree):
        self._others = tree.on_change
        self._events: list[KvEvent] = []
        tree.on_change = self._note

    def _note(self, event: KvEvent) -> None:
        self._others(event)
        self._events.append(event)

    def pull(self) -> Sequence[KvEvent]:
        """All that happened since the last call."""
        events, self._events = self._events, []
        return events
