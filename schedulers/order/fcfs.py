"""First come, first served."""

from ..events import Arrive
from .base import Key, StaticOrder


class Fcfs(StaticOrder):
    """By arrival. No request starves: only finitely many are ever in front of it."""

    def key(self, event: Arrive) -> Key:
        return ()
