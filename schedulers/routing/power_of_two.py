"""Power of two choices: of two drawn replicas the one with less to do. Draws from a seed alone."""

from random import Random

from .base import Choice, Routable, Routing
from .random import SeedParameters
from .views import Views


class PowerOfTwo(Routing):
    """Two distinct healthy replicas are drawn; the one with fewer outstanding requests is chosen,
    of equals the first drawn."""

    def __init__(self, parameters: SeedParameters):
        self._rng = Random(parameters.seed)

    def choose(self, request: Routable, views: Views) -> Choice:
        num = len(views.candidates)
        first = self._rng.randrange(num)
        if num == 1:
            return Choice(int(views.candidates[0]))
        second = self._rng.randrange(num - 1)
        second += second >= first
        one, other = int(views.candidates[first]), int(views.candidates[second])
        return Choice(other if views.outstanding[other] < views.outstanding[one] else one)
