"""The one window into the core: counters since the start and gauges of now."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jaxserve.histogram import Histogram, decades
from jaxserve.schedulers.pages import PoolStatistics
from jaxserve.schedulers.prefix_tree import PrefixStatistics


@dataclass(frozen=True, slots=True)
class Compiles:
    """Programs that XLA compiled: before the engine was ready, and since."""

    startup: int = 0
    serving: int = 0


def _histogram(*bounds: float | int) -> Any:
    return field(default_factory=lambda: Histogram(bounds))


@dataclass(slots=True)
class EngineStatistics:
    """Requests, tokens, slices and pages. `snapshot` gives a copy that no longer changes.

    `waiting` and `running` count requests, `row_steps` rows times steps; `slice_s` is device time,
    `host_s` the host's work that the device waited for or that overlapped with it.
    `slice_idle_row_steps` are those of `row_steps` that ran no prompt and made no token: the row
    had ended, or could not go on. The histograms have one value for each slice, and one for each
    request: from its arrival to the slice that first runs it, from there to its first token, and
    from there to its end.
    """

    waiting: int = 0
    waiting_tokens: int = 0
    running: int = 0
    received: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    preemptions: int = 0
    slices: int = 0
    steps: int = 0
    row_steps: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    slice_s: float = 0.0
    host_s: float = 0.0
    slice_idle_row_steps: int = 0
    page_size: int = 0
    slice_steps: Histogram = _histogram(*(2**power for power in range(10)))
    slice_seconds: Histogram = _histogram(*decades(-4, 1))
    scheduling_seconds: Histogram = _histogram(*decades(-5, 0))
    request_queue_time_seconds: Histogram = _histogram(*decades(-3, 2))
    request_prefill_time_seconds: Histogram = _histogram(*decades(-3, 2))
    request_decode_time_seconds: Histogram = _histogram(*decades(-2, 3))
    compiles: Compiles | None = None
    pool: PoolStatistics | None = None
    prefix: PrefixStatistics | None = None

    def snapshot(
        self, *, running: int, compiles: Compiles, pool: PoolStatistics, prefix: PrefixStatistics
    ) -> "EngineStatistics":
        now = dataclasses.replace(
            self, running=running, compiles=compiles, pool=pool, prefix=prefix
        )
        for name in _HISTOGRAMS:
            setattr(now, name, getattr(self, name).copy())
        return now

    def values(self) -> dict[str, float]:
        """All numbers by name; those of a part carry its name in front, see `Histogram.flat`."""
        flat: dict[str, float] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int | float):
                flat[each.name] = float(value)
            elif isinstance(value, Histogram):
                flat |= value.flat(each.name)
            elif value is not None:
                for name, number in dataclasses.asdict(value).items():
                    flat[f"{each.name}_{name}"] = float(number)
        return flat


_HISTOGRAMS = tuple(
    each.name for each in dataclasses.fields(EngineStatistics) if each.type is Histogram
)
