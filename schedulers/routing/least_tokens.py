"""Fewest uncached prompt tokens ahead: those in the replica's queue, and those on their way."""

from .base import Choice, Routable, Routing
from .views import Views


class LeastTokens(Routing):
    """Fewest uncached prompt tokens waiting or in flight; of equals the fewest requests."""

    def choose(self, request: Routable, views: Views) -> Choice:
        return Choice(views.least(views.waiting_tokens + views.in_flight_tokens))
