"""By priority class, then arrival; with ageing, who waits moves up a class every so often."""

from dataclasses import dataclass

from ..events import Arrive
from ..parameters import not_negative
from .base import Key, StaticOrder


@dataclass(frozen=True, slots=True)
class PriorityParameters:
    """`age_s`: a request gains one class for each `age_s` seconds since its arrival; 0 is off."""

    age_s: float = 0.0

    def __post_init__(self) -> None:
        not_negative("age_s", self.age_s)


class Priority(StaticOrder):
    """Smaller is more urgent.

    Without ageing urgent work that keeps coming starves the rest. With it nobody starves: all age
    alike, so that two requests keep their order, and a request of class p is passed by those of
    class q < p alone that come within (p - q) age_s of it. A preempted one takes its old place.
    """

    def __init__(self, parameters: PriorityParameters | None = None):
        super().__init__()
        self._parameters = parameters or PriorityParameters()

    def key(self, event: Arrive) -> Key:
        age_s = self._parameters.age_s
        return (event.arrived_s + event.priority * age_s if age_s else event.priority,)
