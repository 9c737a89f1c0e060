"""Random: any healthy replica. Knows no load; draws from a seed alone."""

from dataclasses import dataclass
from random import Random

from .base import Choice, Routable, Routing
from .views import Views


@dataclass(frozen=True, slots=True)
class SeedParameters:
    """`seed` of all that is drawn."""

    seed: int = 0


class RandomReplica(Routing):
    """Uniform over healthy replicas."""

    def __init__(self, parameters: SeedParameters):
        self._rng = Random(parameters.seed)

    def choose(self, request: Routable, views: Views) -> Choice:
        return Choice(int(views.candidates[self._rng.randrange(len(views.candidates))]))
