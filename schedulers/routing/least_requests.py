"""Fewest requests: join the shortest queue, by the router's own count. Knows no tokens.

The router counts what it sends at once, so that a burst spreads; microsoft/vidur does the same.
"""

from .base import Choice, Routable, Routing
from .views import Views


class LeastRequests(Routing):
    """Fewest requests sent and not ended, waiting or running; of equals the lowest index."""

    def choose(self, request: Routable, views: Views) -> Choice:
        return Choice(views.least(views.outstanding))
