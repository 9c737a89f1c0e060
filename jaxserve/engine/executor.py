"""Executors: one signature. `scripted.py` needs no device, `jax_executor.py` drives a real one."""

from typing import Protocol, runtime_checkable

from jaxserve.engine.plan import SlicePlan, SliceResult


@runtime_checkable
class Executor(Protocol):
    """Runs slices in the order of dispatch. One thread calls it."""

    def dispatch(self, plan: SlicePlan) -> object:
        """Start a slice and return at once, with a ticket for `wait`."""
        ...

    def wait(self, ticket) -> SliceResult:
        """Block until the slice is done."""
        ...
