"""Least KV memory in use, by share. Counts prompts on their way, so that nothing herds between
reports (project rule)."""

import numpy as np

from .base import Choice, Routable, Routing
from .views import Views


class LeastKv(Routing):
    """Smallest share of KV memory in use, with prompts in flight; of equals the fewest requests."""

    def choose(self, request: Routable, views: Views) -> Choice:
        coming = views.in_flight_prompt_tokens / np.maximum(views.kv_total_tokens, 1)
        return Choice(views.least(views.kv_use + np.where(views.kv_total_tokens > 0, coming, 0.0)))
