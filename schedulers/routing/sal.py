"""SAL: where a request could start first, by work queued and by memory (reconstruction).

Source: "Is the GPU Half-Empty or Half-Full?" (arXiv 2410.17840) names two signals per replica:
prefill tokens queued there, and memory available there. The formula, the combiners, the rates and
the in-flight rule are reconstruction; papers.md 2.2. Knows no prefix.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..parameters import positive
from .base import Choice, Dispatch, Routable, Routing
from .views import Views


@dataclass(frozen=True, slots=True)
class SalParameters:
    """`combiner`: a request starts when both work and memory are there (max), or waits for one
    after the other (sum). `mean_output`: each request needs memory for the mean output so far
    beside its prompt. `prefill_rate` and `release_rate` (tokens/s) are believed until measured.
    `in_flight`: what was sent counts before a report has seen it. `ties` go to the replica with the
    fewest requests, or to the lowest index."""

    combiner: Literal["max", "sum"] = "max"
    mean_output: bool = False
    prefill_rate: float = 8000.0
    release_rate: float = 2000.0
    in_flight: bool = True
    ties: Literal["requests", "index"] = "requests"

    def __post_init__(self) -> None:
        positive("prefill_rate", self.prefill_rate)
        positive("release_rate", self.release_rate)


class Sal(Routing):
    """Least seconds until the request could start."""

    def __init__(self, parameters: SalParameters | None = None):
        self._parameters = parameters or SalParameters()
        self._num_outputs = self._output_tokens = 0

    def choose(self, request: Routable, views: Views) -> Choice:
        by_index = self._parameters.ties == "index"
        return Choice(views.least(self.scores(request, views), by_index=by_index))

    def scores(self, request: Routable, views: Views) -> np.ndarray:
        """Seconds until the request could start, by replica, [R] float."""
        known = self._parameters
        queued = views.waiting_tokens
        need = views.waiting_prompt_tokens + request.num_prompt_tokens
        waiting = views.num_waiting + 1
        if known.in_flight:
            queued = queued + views.in_flight_tokens
            need = need + views.in_flight_prompt_tokens
            waiting = waiting + views.in_flight
        if known.mean_output and self._num_outputs:
            need = need + waiting * (self._output_tokens / self._num_outputs)
        compute = queued / np.where(views.prefill_rate > 0, views.prefill_rate, known.prefill_rate)
        release = np.where(views.release_rate > 0, views.release_rate, known.release_rate)
        # Of a replica that has not reported no shortage is known.
        short = np.where(views.reported, np.maximum(need - views.kv_free_tokens, 0), 0)
        memory = short / release
        return np.maximum(compute, memory) if known.combiner == "max" else compute + memory

    def ended(self, dispatch: Dispatch, num_output_tokens: int) -> None:
        self._num_outputs += 1
        self._output_tokens += num_output_tokens
