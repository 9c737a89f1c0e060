"""Counts what XLA compiles in this process, before an engine is ready and while it serves.

A program that came from the persistent cache counts as well: loading it stops the dispatch thread
too.
"""

from functools import cache
from typing import Final

import jax

from jaxserve.engine.statistics import Compiles

COMPILE_EVENT: Final = "/jax/core/compile/backend_compile_duration"
"""What jax (0.10.2 to 0.12.0) reports once per program."""


class _Process:
    """All compilations since this was made. JAX's listeners are for the process, so it is too."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def total(self) -> int:
        return len(self._seconds)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            self._seconds.append(duration_secs)  # atomic: programs are compiled in several threads


_process = cache(_Process)


class CompileCount:
    """Counts from its making on; `start_serving` when warm-up is over. Thread-safe.

    Whatever else compiles in the process is counted too: an engine has a process to itself.
    """

    def __init__(self) -> None:
        self._made_at = _process().total
        self._ready_at: int | None = None

    def start_serving(self) -> None:
        self._ready_at = _process().total

    def compiles(self) -> Compiles:
        """The counts so far."""
        total = _process().total
        ready_at = total if self._ready_at is None else self._ready_at
        return Compiles(startup=ready_at - self._made_at, serving=total - ready_at)
