"""Compiles a deployment's programs for chips that are not there, and says what they would take.

The programs are those that serving compiles (programs.py), from shapes alone: no weights are made.
The compiler is the chip's own, libtpu or XLA's for CUDA with NVIDIA's assembler, in a process that
was prepared for it before it loaded JAX.
"""

import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Hashable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve import __version__
from jaxserve.config import EngineConfig
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.build import serving_buckets, serving_dtype, serving_pages, serving_shape
from jaxserve.engine.compile_report import (
    DeploymentReport,
    KernelReport,
    ProgramReport,
    Step,
    gigabytes,
)
from jaxserve.engine.gpu_facts import (
    OPTIONS,
    HostWork,
    KernelFacts,
    host_work,
    pallas_kernels,
    thunks,
)
from jaxserve.engine.hlo_facts import collectives, copies
from jaxserve.engine.kernel_choice import KernelChoice, choose_kernels
from jaxserve.engine.programs import Program, Programs, Progress
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.gpu_target import GPU_LIMITS, target_config
from jaxserve.models.partition import spread_config, tensor_mesh
from jaxserve.models.profile import ModelShape
from jaxserve.models.topology import Topology
from jaxserve.schedulers.estimators.roofline_time import RooflineTime

CONTEXT: Final = 1024
"""Tokens of each row that a step is estimated at, unless the pool or the model holds fewer."""

_COMPILERS: Final = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12"),
}
# Environment variables that JAX reads, the first that is set.
_GPU_SHARE: Final = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# How HLO spells the types that pages are stored in.
_HLO_TYPES: Final = {
    "float32": "f32",
    "bfloat16": "bf16",
    "int8": "s8",
    "float8_e4m3fn": "f8e4m3fn",
}


def compile_ahead(
    config: EngineConfig, model: ModelConfig, topology: Topology, progress: Progress
) -> DeploymentReport:
    """Compile everything that a deployment on `topology` will run.

    Raises ConfigError for what a user can mend: a model that cannot be cut so, or whose weights or
    programs do not fit.
    """
    started_s = time.monotonic()
    memory_bytes = _usable_bytes(topology)  # JAX dies of a share that is none
    mesh = topology_mesh(config.mesh, topology)
    programs, kernels, weight_bytes = _programs(config, model, mesh, topology)
    pool_bytes = _chip_bytes(programs.state.pages)
    state_bytes = _chip_bytes(programs.state)
    if weight_bytes + state_bytes > memory_bytes:
        raise ConfigError(
            f"num_pages: got {programs.num_pages}; does not fit: {gigabytes(weight_bytes)} of"
            f" weights and {gigabytes(state_bytes)} of KV pages and slots on each chip, which has"
            f" {gigabytes(memory_bytes)}; allowed: fewer, or unset"
        )
    progress(
        f"{topology.name}: {gigabytes(weight_bytes)} of weights and {gigabytes(pool_bytes)} of KV"
        f" pages on each of {mesh.size} x {topology.device.kind}"
    )
    rows = config.scheduler.max_rows
    context = min(CONTEXT, model.max_context, programs.num_pages * programs.page_size // rows)
    inspector = _Inspector(programs, model, topology, context)
    threads = max(2, len(os.sched_getaffinity(0)))
    try:
        reports = programs.compile_all(progress, threads=threads, compile=inspector.compile)
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, topology) from error
    return DeploymentReport(
        model=model.name,
        num_parameters=model.num_parameters,
        topology=topology.name,
        device=topology.device.kind,
        num_devices=mesh.size,
        dtype=programs.dtype.name,
        kv_dtype=programs.kv_dtype,
        kernels=kernels.names(),
        versions={
            "jaxserve": __version__,
            **_versions("jax", "jaxlib", *_COMPILERS[topology.platform]),
        },
        page_size=programs.page_size,
        num_pages=programs.num_pages,
        kv_copies=programs.config.num_kv_heads // model.num_kv_heads,
        max_context=model.max_context,
        context=context,
        memory_bytes=memory_bytes,
        memory_share=_memory_share(topology),
        weight_bytes=weight_bytes,
        pool_bytes=pool_bytes,
        state_bytes=state_bytes - pool_bytes,
        compile_s=time.monotonic() - started_s,
        programs=tuple(reports[key] for key in sorted(reports, key=_place)),
        gpu_kernels=inspector.kernels(),
    )


def _memory_share(topology: Topology) -> float:
    """What a process may take of a chip's memory: of a GPU, as much as JAX allocates at start.

    Raises ConfigError for a variable that says no share.
    """
    if topology.platform == "tpu":
        return 1.0
    name, text = next(((n, t) for n in _GPU_SHARE if (t := os.environ.get(n))), ("", "0.75"))
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{name}: got {text!r}; allowed: above 0, at most 1")
    return share


def _usable_bytes(topology: Topology) -> int:
    return int(topology.device.memory_bytes * _memory_share(topology))


def topology_mesh(mesh: str, topology: Topology) -> Mesh:
    """All chips of the topology, or as many as `mesh` says. Raises ConfigError for more."""
    if topology.platform == "tpu":
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    else:
        described = topologies.get_topology_desc(
            platform="cuda",
            target_config=target_config(topology.chip),
            topology=f"1x1x{topology.num_chips}",  # machines, processes of each, GPUs of each
        )
    found = described.devices
    wanted = len(found) if mesh == "auto" else int(mesh.removeprefix("tp="))
    return tensor_mesh(wanted, found)


def _programs(
    config: EngineConfig, model: ModelConfig, mesh: Mesh, topology: Topology
) -> tuple[Programs, KernelChoice, int]:
    """The programs with as many pages as serving would take, and the weights' bytes per chip."""
    dtype = serving_dtype(config, topology.platform)
    held = spread_config(model, mesh.size)
    chosen = choose_kernels(config, held, dtype=dtype, device=mesh.devices.flat[0])

    def made(num_pages: int) -> Programs:
        return Programs(
            model,
            mesh=mesh,
            shape=serving_shape(config, model),
            buckets=serving_buckets(config),
            num_pages=num_pages,
            page_size=config.cache.page_size,
            kernels=chosen.attention,
            dtype=dtype,
            kv_dtype=chosen.kv_dtype,
        )

    weight_bytes = _chip_bytes(made(2).weights)
    free_bytes = _usable_bytes(topology) - weight_bytes
    if free_bytes <= 0:
        raise ConfigError(
            f"topology: got {topology.name}, {gigabytes(_usable_bytes(topology))} a chip;"
            f" does not fit: {gigabytes(weight_bytes)} of weights on each of {mesh.size}; allowed:"
            " more or larger chips"
        )
    token_bytes = chosen.bytes_per_token(held, config.cache.page_size)
    num_pages = serving_pages(config, held, token_bytes, lambda: free_bytes * mesh.size)
    chosen.check_pool(held, num_pages, config.cache.page_size, num_devices=mesh.size)
    return made(num_pages), chosen, weight_bytes


def _explained(error: Exception, topology: Topology) -> ConfigError:
    reason = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in reason:
        return ConfigError(f"topology: got {topology.name}; does not fit: {reason}")
    return ConfigError(f"topology: got {topology.name}; its compiler failed: {reason}")


def _place(key: Hashable) -> tuple[bool, int, int]:
    """Slice programs by size, then the others."""
    return (False, key.tiles, key.rows) if isinstance(key, Bucket) else (True, 0, 0)


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class _Inspector:
    """Compiles programs and keeps what can be said of them, not the programs."""

    def __init__(self, programs: Programs, model: ModelConfig, topology: Topology, context: int):
        self._tile, self._context = programs.shape.tile, context
        self._pool_sizes, self._limits = _pool_sizes(programs), GPU_LIMITS.get(topology.chip)
        self._options: dict[str, Any] = {"xla_dump_hlo_as_text": True}
        if self._limits is not None:
            self._options |= OPTIONS
        self._kernels: dict[str, list[KernelFacts]] = defaultdict(list)
        self._time = RooflineTime(
            sizes=ModelShape.of(model).sizes(programs.dtype.name, programs.kv_dtype),
            device=topology.device,
            num_devices=programs.mesh.size,
        )

    def compile(self, program: Program) -> ProgramReport:
        """Compile it, with the compiler's own text of what it made.

        jaxlib cannot always turn what a newer libtpu made into text ("async-update instruction
        should have 1 operands"; 0.10.2 and 0.0.51, v6e:4x4).
        """
        bucket = program.key if isinstance(program.key, Bucket) else None
        started_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="jaxserve-compile-") as name:
            folder = Path(name)
            compiled = program.compile({"xla_dump_to": name, **self._options})
            seconds = time.monotonic() - started_s
            text = max(folder.glob("*after_optimizations.txt"), key=_size).read_text()
            host = self._seen_of_gpu(folder, text) if self._limits is not None else None
        memory = compiled.memory_analysis()
        model_steps = 2 if bucket is not None and bucket.tiles else 1  # step 0, the loop's body
        return ProgramReport(
            name=program.name,
            compile_s=seconds,
            temporary_bytes=memory.temp_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            aliased_bytes=memory.alias_size_in_bytes,
            pool_copies=copies(text, self._pool_sizes),
            collectives={name: count / model_steps for name, count in collectives(text).items()},
            step=None if bucket is None else self._step(bucket),
            host=host,
        )

    def _seen_of_gpu(self, folder: Path, text: str) -> HostWork:
        for facts in pallas_kernels(folder, text):
            self._kernels[facts.name].append(facts)
        return host_work(thunks(folder))

    def kernels(self) -> tuple[KernelReport, ...]:
        """The Pallas kernels of all programs compiled so far, if a GPU's."""
        if self._limits is None:
            return ()
        names = sorted(self._kernels)
        return tuple(KernelReport.of(self._kernels[name], self._limits) for name in names)

    def _step(self, bucket: Bucket) -> Step:
        """Every row decodes over `context` tokens, beside as many prompt tokens as there are."""
        rows, prompt = bucket.rows, bucket.tiles * self._tile
        attended, prompt_attended = rows * self._context, prompt * (prompt + 1) // 2
        return Step(
            flops=self._time.step_flops(rows, rows + prompt, attended + prompt_attended),
            num_bytes=self._time.step_bytes(rows, rows + prompt, attended, prompt_attended),
            seconds=self._time.step_s(rows, attended, prompt, prompt_attended),
        )


def _size(path: Path) -> int:
    return path.stat().st_size


def _pool_sizes(programs: Programs) -> frozenset[tuple[str, int]]:
    """Type and numbers of the whole pool's arrays on a chip, and of one layer's."""
    sizes = set()
    for leaf in jax.tree.leaves(programs.state.pages):
        numbers, layers = _chip_numbers(leaf), programs.config.num_layers
        name = _HLO_TYPES[leaf.dtype.name]
        sizes |= {(name, numbers), (name, numbers // layers)}
    return frozenset(sizes)


def _chip_numbers(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _chip_bytes(tree: Any) -> int:
    """What a chip holds of the arrays in a tree."""
    return sum(_chip_numbers(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
