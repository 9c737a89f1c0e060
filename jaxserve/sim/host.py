"""When a replica's host next takes commands and plans: what its own work takes, in virtual time."""

import enum
from typing import Final, Protocol, runtime_checkable

from jaxserve.engine.plan import SlicePlan
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import SliceTime

EXPOSED_SHARE: Final = 0.55
"""Of the host's work around a slice, what an idle device waits for; the rest, reporting, is done
while it runs. Six live runs on a CPU core: 0.51 to 0.62. Where both share a core it is all."""
PARSE_SHARE: Final = 0.13
"""Of what is exposed, what comes before the host takes commands again: parsing. Mean and median of
nine live runs on a CPU core are 0.15 and 0.12."""
WAKE_S: Final = 3.5e-4
"""From a command to the plan of a dispatch thread that had nothing to do: the median there."""


class After(enum.Enum):
    """What the host has just done."""

    IDLE = "idle"
    PARSE = "parse"
    DISPATCH = "dispatch"


@runtime_checkable
class Host(Protocol):
    """The host of one replica."""

    def turn_s(self, now_s: float, after: After, plan: SlicePlan | None) -> float:
        """When it next takes commands; `plan` is the slice that was parsed or dispatched."""
        ...

    def again_s(self, now_s: float) -> float | None:
        """When it takes commands once more before it waits for the device; None: it does not."""
        ...

    def host_s(self, number: int, worked_s: float) -> float:
        """What it says of its work around a slice, having worked so long in virtual time."""
        ...


class ModelledHost:
    """Takes what a serving-time model says, which it is asked once for each slice. `overlaps`: it
    has a core of its own."""

    def __init__(self, time: SliceTime, *, overlaps: bool = True):
        self._time = time
        self._exposed = EXPOSED_SHARE if overlaps else 1.0
        self._exposed_s: dict[int, float] = {}  # of slices that are not parsed yet

    def turn_s(self, now_s: float, after: After, plan: SlicePlan | None) -> float:
        if plan is None:
            return now_s + WAKE_S
        if after is After.PARSE:
            return now_s + PARSE_SHARE * self._exposed_s.pop(plan.number)
        work = SliceShape(plan.steps, len(plan.rows), 0, plan.num_prefill_tokens)
        exposed_s = self._exposed_s[plan.number] = self._exposed * self._time.host_s(work)
        return now_s + (1 - PARSE_SHARE) * exposed_s

    def again_s(self, now_s: float) -> float | None:
        return None  # what comes while it reports is rare enough to wait for the slice's end

    def host_s(self, number: int, worked_s: float) -> float:
        return worked_s / self._exposed
