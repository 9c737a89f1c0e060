"""The one window into the core: counters since the start and gauges of now."""

import dataclasses
from dataclasses import dataclass

from jaxserve.schedulers.pages import PoolStatistics
from jaxserve.schedulers.prefix_tree import PrefixStatistics


@dataclass(slots=True)
class EngineStatistics:
    """Requests, tokens, slices and pages. `snapshot` gives a copy that no longer changes.

    `waiting` and `running` count requests, `row_steps` rows times steps; `slice_s` is device time,
    `host_s` the host's work that the device waited for or that overlapped with it.
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
    pool: PoolStatistics | None = None
    prefix: PrefixStatistics | None = None

    def snapshot(
        self, *, running: int, pool: PoolStatistics, prefix: PrefixStatistics
    ) -> "EngineStatistics":
        return dataclasses.replace(self, running=running, pool=pool, prefix=prefix)

    def values(self) -> dict[str, float]:
        """All numbers by name; those of pool and prefix tree carry a prefix."""
        flat: dict[str, float] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                flat[field.name] = float(value)
            elif value is not None:
                for name, number in dataclasses.asdict(value).items():
                    flat[f"{field.name}_{name}"] = float(number)
        return flat
