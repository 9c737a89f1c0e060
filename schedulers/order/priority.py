"""By priority class, then arrival."""

from ..events import Arrive
from .base import StaticOrder


class Priority(StaticOrder):
    """Smaller is more urgent. Starves the rest while urgent work keeps coming; it does not age."""

    def key(self, event: Arrive) -> tuple[int, ...]:
        return (event.priority,)
