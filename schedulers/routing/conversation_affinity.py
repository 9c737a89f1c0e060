"""Conversation affinity: a session goes where its hash says, unless too much is there.

Consistent hashing with bounded loads: every replica has points on a ring, a session's hash lies
between two of them, and the next points' replicas are tried in turn. Knows no cache.
"""

from bisect import bisect_left
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil

from ..parameters import not_negative, require
from .base import Choice, Routable, Routing
from .views import Views


@dataclass(frozen=True, slots=True)
class ConversationAffinityParameters:
    """No replica gets more than (1 + `eps`) times the mean of outstanding requests, rounded up.
    `points` on the ring per replica: the more, the more evenly sessions spread."""

    eps: float = 0.25
    points: int = 64

    def __post_init__(self) -> None:
        not_negative("eps", self.eps)
        require(1 <= self.points <= 4096, "points", self.points, "1 to 4096")


def _place(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


class ConversationAffinity(Routing):
    """The session's place on the ring, or the next one that is healthy and not full. A request
    without a session goes to the replica with the fewest requests."""

    def __init__(self, parameters: ConversationAffinityParameters, *, num_replicas: int):
        self._parameters = parameters
        self._ring: list[tuple[int, int]] = []  # (place, replica), ascending
        self._num_replicas = 0
        for replica in range(num_replicas):
            self._add(replica)
        self._ring.sort()

    def _add(self, replica: int) -> None:
        points = range(self._parameters.points)
        self._ring += [(_place(f"{replica}/{point}"), replica) for point in points]
        self._num_replicas += 1

    def joined(self, replica: int) -> None:
        if replica == self._num_replicas:  # a place that was lost has kept its points
            self._add(replica)
            self._ring.sort()

    def choose(self, request: Routable, views: Views) -> Choice:
        if request.session is None:
            return Choice(views.least(views.outstanding))
        present = int(views.outstanding[views.candidates].sum()) + 1
        most = ceil((1 + self._parameters.eps) * present / len(views.candidates))
        start = bisect_left(self._ring, (_place(request.session), 0))
        for offset in range(len(self._ring)):
            replica = self._ring[(start + offset) % len(self._ring)][1]
            if views.healthy[replica] and views.outstanding[replica] < most:
                return Choice(replica)
        raise AssertionError("somebody is below the mean")
