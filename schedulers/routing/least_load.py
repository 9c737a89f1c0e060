"""Least load in seconds: the time that the queue takes, and a price of full memory.

Source: lightseekorg/smg. score = (uncached tokens waiting + tokens sent since the last report) /
throughput + w k / (1 - k), with k the share of KV memory in use. Knows no prefix.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from ..parameters import not_negative, positive, require
from .base import Choice, Routable, Routing
from .views import Views

MOST_KV_USE: Final = 0.999


@dataclass(frozen=True, slots=True)
class LeastLoadParameters:
    """`kv_weight_s` is w, the seconds that half of the memory in use is worth. `throughput` of
    prompt tokens per second is believed until it was measured. A replica that has not reported,
    while others have, is believed to wait for `request_tokens` per request."""

    kv_weight_s: float = 0.15
    throughput: float = 2000.0
    request_tokens: int = 1024

    def __post_init__(self) -> None:
        not_negative("kv_weight_s", self.kv_weight_s)
        positive("throughput", self.throughput)
        require(self.request_tokens > 0, "request_tokens", self.request_tokens, "1 or more")


class LeastLoad(Routing):
    """Least seconds of queue and memory; of equals the fewest requests."""

    def __init__(self, parameters: LeastLoadParameters | None = None):
        self._parameters = parameters or LeastLoadParameters()

    def choose(self, request: Routable, views: Views) -> Choice:
        if not views.reported[views.candidates].any():
            return Choice(views.least(views.outstanding))
        return Choice(views.least(self.scores(views)))

    def scores(self, views: Views) -> np.ndarray:
        """Seconds by replica, [R] float. At least one healthy replica has reported."""
        known = self._parameters
        rates = np.where(views.prefill_rate > 0, views.prefill_rate, known.throughput)
        seconds = (views.waiting_tokens + views.in_flight_tokens) / rates
        use = np.minimum(views.kv_use, MOST_KV_USE)
        scores = seconds + known.kv_weight_s * use / (1 - use)
        reported = views.reported & views.healthy
        if not reported.all():
            guess = views.outstanding * known.request_tokens / rates[reported].mean()
            scores = np.where(reported, scores, guess)
        return scores
