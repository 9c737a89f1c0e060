"""The device that all replicas of a simulation have: its shapes and how long it takes."""

from dataclasses import dataclass

from jaxserve.clock import Clock
from jaxserve.engine.buckets import Buckets
from jaxserve.schedulers.estimators.slice_time import SliceTime
from jaxserve.sim.modelled import ModelledExecutor, Outputs


@dataclass(frozen=True, slots=True)
class Device:
    """A serving-time model and the programs that it is a model of. `host_overlaps`: the host works
    beside it, on a core of its own."""

    time: SliceTime
    buckets: Buckets
    vocab_size: int
    max_context: int
    host_overlaps: bool = True

    def executor(self, clock: Clock, outputs: Outputs) -> ModelledExecutor:
        """A device of its own for each replica."""
        return ModelledExecutor(
            self.time, outputs, clock, buckets=self.buckets, vocab_size=self.vocab_size
        )
