"""Round robin: the next healthy replica. Knows no load."""

from .base import Choice, Routable, Routing
from .views import Views


class RoundRobin(Routing):
    """The next healthy index after the last one chosen."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: Routable, views: Views) -> Choice:
        place = int(views.candidates.searchsorted(self._last, side="right"))
        self._last = int(views.candidates[place % len(views.candidates)])
        return Choice(self._last)
