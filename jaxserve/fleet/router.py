"""The router: which replica gets a request, and what is known of each. No I/O, and no clock.

Simulator and live fleet drive the same object: they tell what happened, and when, and send what
`route` says where it says. Knows no transport, no tokens and no engine.
"""

from jaxserve.errors import NotReady
from jaxserve.schedulers.events import CacheChange
from jaxserve.schedulers.routing import Dispatch, LoadReport, Routable, Routing, Views


class NoReplica(NotReady):
    """No replica can take a request now: hold it until one comes back."""


class Router:
    """Replicas are places 0 to R - 1, all present and healthy at first.

    Reports and cache events of a replica that is lost are ignored until it has joined again; those
    of its earlier life must not be handed on after that. Times are seconds on one clock of the
    caller's, and do not fall.
    """

    def __init__(self, routing: Routing, *, num_replicas: int):
        if num_replicas < 1:
            raise ValueError(f"num_replicas: got {num_replicas}; allowed: 1 or more")
        self.routing = routing
        self.views = Views(num_replicas)
        self._sent: dict[int, Dispatch] = {}
        self._there: list[dict[int, Dispatch] | None] = [{} for _ in range(num_replicas)]

    def route(self, request: Routable, now_s: float) -> int:
        """The replica that gets the request, which counts as sent there from now on.

        Raises NoReplica when none is healthy; then nothing has changed.
        """
        if not len(self.views.candidates):
            raise NoReplica(f"no replica of {len(self.views)} is healthy; hold the request")
        self.views.now_s = now_s
        replica, num_cached = self.routing.choose(request, self.views)
        number = self.views.sent(
            replica,
            num_extend_tokens=request.num_prompt_tokens - num_cached,
            num_prompt_tokens=request.num_prompt_tokens,
        )
        dispatch = self._sent[request.number] = Dispatch(request, replica, number, num_cached)
        there = self._there[replica]
        assert there is not None, f"replica {replica} was chosen, and is gone"
        there[request.number] = dispatch
        self.routing.sent(dispatch)
        return replica

    def report(self, replica: int, report: LoadReport, now_s: float) -> None:
        """A load report came in."""
        if self._there[replica] is not None:
            self.views.now_s = now_s
            self.views.report(replica, report)

    def cache_changed(self, replica: int, event: CacheChange, seen: int) -> None:
        """A replica's prefix cache changed when it had received `seen` dispatches."""
        if self._there[replica] is not None:
            self.routing.cache_changed(replica, event, seen)

    def ended(self, number: int, num_output_tokens: int) -> None:
        """A request is over, in whatever way; it made so many tokens on its present replica. One
        that was lost meanwhile is nobody's."""
        dispatch = self._sent.pop(number, None)
        if dispatch is None:
            return
        there = self._there[dispatch.replica]
        assert there is not None
        del there[number]
        self.views.ended(dispatch.replica)
        self.routing.ended(dispatch, num_output_tokens)

    def set_healthy(self, replica: int, healthy: bool) -> None:
        """Whether the replica may be sent requests; what it has it keeps."""
        if self._there[replica] is None or self.views.healthy[replica] == healthy:
            return
        self.views.set_healthy(replica, healthy)
        if healthy:
            self.routing.returned(replica)

    def lost(self, replica: int) -> list[int]:
        """The replica is gone with all it had; returns the numbers of the requests that were there,
        in the order in which they were sent. They may be routed again under the same numbers."""
        there, self._there[replica] = self._there[replica], None
        if there is None:
            return []
        for number in there:
            del self._sent[number]
        self.views.lost(replica)
        self.routing.lost(replica, list(there.values()))
        return list(there)

    def joined(self, replica: int) -> None:
        """A fresh replica, in the place of a lost one or, where `replica` is R, in a new place.

        Raises ValueError where a replica is.
        """
        places = [place for place, there in enumerate(self._there) if there is None]
        places.append(len(self._there))
        if replica not in places:
            raise ValueError(f"replica: got {replica}; allowed: {', '.join(map(str, places))}")
        if replica == len(self._there):
            self._there.append({})
        self._there[replica] = {}
        self.views.joined(replica)
        self.routing.joined(replica)

    def dispatched(self, replica: int) -> int:
        """How many requests were sent to the replica since it joined."""
        return int(self.views.dispatched[replica])
