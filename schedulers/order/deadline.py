"""Earliest deadline first: papers.md 2.5, `edf`. Refusal on arrival is a project rule."""

import math
from dataclasses import dataclass

from ..events import Arrive
from ..parameters import not_negative
from .base import Key, StaticOrder


@dataclass(frozen=True, slots=True)
class DeadlineParameters:
    """`service_share`: a request is refused on arrival when less than this share of the time that
    it is estimated to take alone is left. With 0 only a deadline that has passed is refused; 1
    trusts the estimate, and refuses in vain where it is too long."""

    service_share: float = 0.5

    def __post_init__(self) -> None:
        not_negative("service_share", self.service_share)


class Deadline(StaticOrder):
    """By deadline, then arrival; who has none comes last, by arrival, and starves while others with
    deadlines keep coming.

    A request whose deadline cannot be met even if it had the engine to itself is refused: what it
    would take is kept for those that can be served in time. Nobody is dropped later: the engine
    ends requests when their deadlines pass.
    """

    def __init__(self, parameters: DeadlineParameters | None = None):
        super().__init__()
        self._parameters = parameters or DeadlineParameters()

    def key(self, event: Arrive) -> Key:
        return (math.inf if event.deadline_s is None else event.deadline_s,)

    def refuses(self, event: Arrive) -> str | None:
        """Of a deadline that has passed, or leaves less than the share of the service time."""
        if event.deadline_s is None:
            return None
        left_s = event.deadline_s - event.arrived_s
        needed_s = self._parameters.service_share * event.service_s
        if left_s > needed_s:
            return None
        allowed = f"more than {needed_s:.3f} s from now, for what the request takes alone"
        return f"deadline: got {left_s:.3f} s from now; allowed: {allowed}"
