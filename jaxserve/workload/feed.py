"""When each request of a workload is sent: by its arrival, or when earlier ones have ended.

No clock and no I/O: load client and simulator drive the same object.
"""

from collections.abc import Iterator

from jaxserve.workload.work import Work, Workload


class Feed:
    """An open loop: requests are sent at their arrival, whatever became of earlier ones."""

    def __init__(self, workload: Workload):
        self._rest: Iterator[Work] = workload.requests()
        self._next = next(self._rest, None)

    def next_s(self) -> float | None:
        """When the next request is to be sent; None: not before another one ends, or never."""
        return None if self._next is None else self._next.arrival_s

    def take(self, now_s: float) -> list[tuple[float, Work]]:
        """All requests due by `now_s`, each with the time it was due."""
        due = []
        while self._next is not None and self._next.arrival_s <= now_s:
            due.append((self._next.arrival_s, self._next))
            self._next = next(self._rest, None)
        return due

    def ended(self, work: Work, now_s: float) -> None:
        """A request that was sent has ended, in whatever way."""

    @property
    def finished(self) -> bool:
        """All requests were given out."""
        return self._next is None
