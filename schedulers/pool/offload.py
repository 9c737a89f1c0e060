"""Which instance runs a batch: the load of each, max-min offloading and round robin.

Published: the name "max-min". Reconstruction: longest batch first, each to the least loaded
instance, and load as the sum of estimates of unfinished batches (papers.md 1.6). From idle
instances the makespan is at most 4/3 - 1/(3 m) of the best there is.
"""

from collections.abc import Sequence

_NS = 1e9


class Loads:
    """Estimated seconds of the batches each instance has and has not finished.

    Counted in whole nanoseconds: what is added is subtracted to the digit, so that an idle
    instance has exactly 0.
    """

    def __init__(self, num_instances: int):
        self._ns = [0] * num_instances
        self._batches = [0] * num_instances

    def __len__(self) -> int:
        return len(self._ns)

    def add(self, instance: int, estimate_s: float) -> None:
        self._ns[instance] += _whole(estimate_s)
        self._batches[instance] += 1

    def subtract(self, instance: int, estimate_s: float) -> None:
        """The batch that was added with the same estimate has run."""
        self._ns[instance] -= _whole(estimate_s)
        self._batches[instance] -= 1

    def seconds(self) -> list[float]:
        return [ns / _NS for ns in self._ns]

    @property
    def least_s(self) -> float:
        return min(self._ns) / _NS

    def idle(self) -> list[int]:
        """Instances that have nothing to run."""
        return [instance for instance, batches in enumerate(self._batches) if not batches]


def _whole(seconds: float) -> int:
    return round(seconds * _NS)


def max_min(estimates_s: Sequence[float], loads_s: Sequence[float]) -> list[int]:
    """An instance for each batch: the longest first, each to the least loaded (ties: the first)."""
    loads = list(loads_s)
    chosen = [0] * len(estimates_s)
    for batch in sorted(range(len(estimates_s)), key=lambda batch: -estimates_s[batch]):
        instance = loads.index(min(loads))
        loads[instance] += estimates_s[batch]
        chosen[batch] = instance
    return chosen
