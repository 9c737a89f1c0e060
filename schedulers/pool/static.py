"""Sequence-level scheduling: first come, first served, static batches of a fixed size that run
until all members end, instances in turn. The baseline SLS of SCLS (arXiv 2406.13511).

Reconstruction: its settings. The size is the most rows that fit if all had the longest prompt and
made the most tokens, so that no batch can run out of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..parameters import at_least, positive, require
from .memory_rule import Unit
from .planner import PoolSetup
from .request import PoolRequest
from .scls import Scls, SclsParameters


@dataclass(frozen=True, slots=True)
class StaticParameters:
    """`max_input` and `max_output` bound requests, in tokens. `batch_size` 0: as memory allows."""

    max_input: int = 1024
    max_output: int = 1024
    zeta: float = 0.9
    memory: Unit = "tokens"
    batch_size: int = 0
    interval_gamma_s: float = 3.0

    def __post_init__(self) -> None:
        at_least("max_input", self.max_input, 1)
        at_least("max_output", self.max_output, 1)
        require(0 < self.zeta <= 1, "zeta", self.zeta, "a number in (0, 1]")
        at_least("batch_size", self.batch_size, 0)
        positive("interval_gamma_s", self.interval_gamma_s)


class Static(Scls):
    """One slice as long as the longest output: SCLS's step so without slices."""

    def __init__(self, parameters: StaticParameters, setup: PoolSetup):
        """Raises ValueError where not even one request of the longest kind fits."""
        like = SclsParameters(
            step="so",
            zeta=parameters.zeta,
            memory=parameters.memory,
            batch_size=parameters.batch_size,
            interval_gamma_s=parameters.interval_gamma_s,
        )
        super().__init__(like, setup, slice_len=parameters.max_output)
        self._limits = parameters
        longest = PoolRequest(0, 0.0, parameters.max_input, parameters.max_output)
        most = self._most_tokens(longest)
        if not self._rule.fits(1, most, 0):
            raise ValueError(
                f"max_input: got {parameters.max_input} beside max_output={parameters.max_output},"
                f" for which {most} tokens must fit; allowed: {self._rule.memory.num_tokens} in"
                " all, the KV memory of an instance under zeta"
            )
        self._size = super()._batch_size([longest])

    def check(self, request: PoolRequest) -> None:
        for name, got, most in (
            ("prompt tokens", request.prompt_tokens, self._limits.max_input),
            ("tokens to make", request.max_output, self._limits.max_output),
        ):
            if got > most:
                raise ValueError(
                    f"request {request.number}: got {got} {name}; allowed: {most}, for which the"
                    " batch size was chosen (pool_options max_input, max_output)"
                )

    def _batch_size(self, requests: Sequence[PoolRequest]) -> int:
        return self._size

    def _estimate_s(self, group: Sequence[PoolRequest]) -> float:
        length = max(request.length for request in group)
        return self.time.slice_s(len(group), length, self._steps(group))
