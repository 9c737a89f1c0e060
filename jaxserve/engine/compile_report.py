"""What `jaxserve compile` found out about a deployment, per chip. Loads no JAX."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jaxserve.engine.gpu_facts import HostWork, KernelFacts
from jaxserve.models.gpu_target import GpuLimits

SCHEMA: Final = "jaxserve.compile/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A model step of a slice program, by counting: see `RooflineTime`. Of one chip."""

    flops: float
    num_bytes: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramReport:
    """One compiled program. `aliased_bytes` of its results lie where its arguments did.

    `pool_copies` counts what makes a new array as large as the KV pool or a layer of it.
    `collectives` are those of one model step. `step` is None for programs that run no model,
    `host` where a program is one launch (TPU).
    """

    name: str
    compile_s: float
    temporary_bytes: int
    code_bytes: int
    aliased_bytes: int
    pool_copies: Mapping[str, int]
    collectives: Mapping[str, float]
    step: Step | None
    host: HostWork | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """A Pallas kernel on a GPU: over all programs the most that it takes, and how many of its own
    programs a multiprocessor holds at once, at least."""

    name: str
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    per_core: int

    @staticmethod
    def of(found: Sequence[KernelFacts], limits: GpuLimits) -> "KernelReport":
        """From the same kernel as it stands in several programs."""
        return KernelReport(
            name=found[0].name,
            threads=max(facts.threads for facts in found),
            registers=max(facts.registers for facts in found),
            spilled_bytes=max(facts.spilled_bytes for facts in found),
            shared_bytes=max(facts.shared_bytes for facts in found),
            per_core=min(
                limits.programs_per_core(
                    registers=facts.registers,
                    threads=facts.threads,
                    shared_bytes=facts.shared_bytes,
                )
                for facts in found
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentReport:
    """A model on a topology. Bytes are of one chip.

    Each kv head is held `kv_copies` times, and counted so. `context` tokens of each row is what
    steps are estimated at. `memory_bytes` are `memory_share` of a chip's: what a process may take.
    `state_bytes` is what slots hold beside pages: counts and biases.
    """

    model: str
    num_parameters: int
    topology: str
    device: str
    num_devices: int
    dtype: str
    kv_dtype: str
    kernels: Mapping[str, str]
    versions: Mapping[str, str]
    page_size: int
    num_pages: int
    kv_copies: int
    max_context: int
    context: int
    memory_bytes: int
    memory_share: float
    weight_bytes: int
    pool_bytes: int
    state_bytes: int
    compile_s: float
    programs: tuple[ProgramReport, ...]
    gpu_kernels: tuple[KernelReport, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def temporary_bytes(self) -> int:
        """Of the program that takes the most: one runs at a time."""
        return max(program.temporary_bytes for program in self.programs)

    @property
    def code_bytes(self) -> int:
        """Of all programs: they stay loaded."""
        return sum(program.code_bytes for program in self.programs)

    @property
    def used_bytes(self) -> int:
        held = self.weight_bytes + self.pool_bytes + self.state_bytes
        return held + self.temporary_bytes + self.code_bytes

    def faults(self) -> list[str]:
        """Why this should not be served so; none if it is well."""
        found = []
        if self.used_bytes > self.memory_bytes:
            found.append(
                f"does not fit: {gigabytes(self.used_bytes)} of {gigabytes(self.memory_bytes)} on"
                " each chip; lower --kv_memory_fraction, --max_rows or --max_prefill_tokens, or"
                " take a larger --topology"
            )
        for program in self.programs:
            if program.aliased_bytes < self.pool_bytes:
                found.append(f"{program.name}: its KV pages are not aliased, so it holds two pools")
            if program.pool_copies:
                what = ", ".join(f"{n} x {name}" for name, n in program.pool_copies.items())
                found.append(f"{program.name}: copies KV pages: {what}")
        return found

    def to_json(self) -> str:
        totals = {
            name: getattr(self, name)
            for name in ("num_tokens", "temporary_bytes", "code_bytes", "used_bytes")
        }
        fields: dict[str, Any] = dataclasses.asdict(self)
        return json.dumps({"schema": SCHEMA, **fields, **totals, "faults": self.faults()}, indent=1)


def gigabytes(num_bytes: int | float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
