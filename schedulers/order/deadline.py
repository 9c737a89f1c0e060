"""Earliest deadline first: papers.md 2.5, `edf`."""

import math

from ..events import Arrive
from .base import Key, StaticOrder


class Deadline(StaticOrder):
    """By deadline, then arrival; who has none comes last, by arrival.

    Starves those while others with deadlines keep coming. A deadline that has passed counts like
    any other: nobody is dropped.
    """

    def key(self, event: Arrive) -> Key:
        return (math.inf if event.deadline_s is None else event.deadline_s,)
