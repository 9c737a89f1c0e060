"""`jaxserve compile`: every program of a deployment, by the chip's own compiler, on any machine.

The report goes to stdout, progress to stderr. Exit codes: 0 it fits, 2 it does not, or something
else the user can mend, 130 interrupted.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from jaxserve.config import EngineConfig
from jaxserve.engine.gpu_facts import find_ptxas
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.models.sources import load_model_config, parse_source
from jaxserve.models.topology import Topology, parse_topology
from jaxserve.server.logs import set_up_logging
from jaxserve.server.progress import ProgressDisplay
from jaxserve.server_config import CompileConfig, LogConfig

if TYPE_CHECKING:
    from jaxserve.engine.compile_report import DeploymentReport

EXIT_INTERRUPTED: Final = 130

_CUDA_PLUGINS: Final = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_COLUMNS: Final = ("compile s", "temp MB", "KV aliased", "KV copies")
_HOST_COLUMNS: Final = ("host waits", "launches")
_STEP_COLUMNS: Final = ("GFLOP", "GB", "ms", "per step")
_FILE_WIDTH: Final = 140


def main(settings: Settings) -> int:
    """Compile a deployment; returns the exit code. Raises ConfigError for what the user can mend,
    a deployment that does not fit included."""
    config, engine = settings.record(CompileConfig), settings.record(EngineConfig)
    set_up_logging(settings.record(LogConfig).log_level)
    topology = parse_topology(config.topology)
    model = load_model_config(parse_source(engine.model))
    prepare_process(topology)
    from jaxserve.engine.compile_ahead import compile_ahead

    progress = ProgressDisplay(Console(stderr=True))
    try:
        report = compile_ahead(engine, model, topology, progress.show)
    except KeyboardInterrupt:
        print("jaxserve: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        progress.close()
    show(report, _console())
    if config.json:
        _write(Path(config.json), report)
    if faults := report.faults():
        raise ConfigError("; ".join(faults))
    return 0


def prepare_process(topology: Topology) -> None:
    """Tell JAX and the compiler, before they are loaded, of chips that are not there.

    Raises ConfigError when there is no compiler.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # what compiles needs no device, and must not wait for one
    if topology.platform == "gpu":
        _prepare_for_gpu()
    else:
        _prepare_for_tpu(topology)


def _prepare_for_gpu() -> None:
    if not any(map(_is_installed, _CUDA_PLUGINS)):
        raise ConfigError(
            "topology: needs JAX's plug-in for CUDA, which has the compiler; try pip install"
            " 'jaxserve[gpu-compile]'"
        )
    find_ptxas()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns of the driver that is not there


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _prepare_for_tpu(topology: Topology) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "topology: needs libtpu, which has the TPU's compiler; try pip install 'jaxserve[tpu]'"
        )
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # a machine in a cloud would be asked what it is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": topology.accelerator_type,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
    }


def show(report: "DeploymentReport", console: Console) -> None:
    """Print what a deployment takes, per chip and per program."""
    kernels = ", ".join(f"{operation} {name}" for operation, name in report.kernels.items())
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    _say(
        console,
        f"{report.model}, {report.num_parameters / 1e9:.2f} G parameters in {report.dtype}, on"
        f" {report.topology}: {report.num_devices} x {report.device}; {kernels}; keys and values"
        f" in {report.kv_dtype}",
    )
    _say(console, f"{len(report.programs)} programs in {report.compile_s:.0f} s; {versions}")
    _show_memory(report, console)
    _show_programs(report, console)
    if report.gpu_kernels:
        _show_kernels(report, console)


def _show_memory(report: "DeploymentReport", console: Console) -> None:
    table = Table("per chip", "GB", "", box=None, pad_edge=False)
    copies = f", each kv head held {report.kv_copies} times" * (report.kv_copies > 1)
    share = f", {report.memory_share:.0%} of its memory" * (report.memory_share < 1)
    rows = {
        "weights": (report.weight_bytes, ""),
        "KV pages": (
            report.pool_bytes,
            f"{report.num_pages} pages of {report.page_size}: {report.num_tokens} tokens in all"
            f"{copies}",
        ),
        "slots' counts and biases": (report.state_bytes, ""),
        "temporaries": (
            report.temporary_bytes,
            f"at most; {report.temporary_bytes / report.pool_bytes:.1%} of the KV pages",
        ),
        "code": (
            report.code_bytes,
            f"of {len(report.programs)} programs"
            if report.code_bytes
            else "its compiler says none",
        ),
        "in all": (report.used_bytes, f"of {report.memory_bytes / 1e9:.2f}{share} (data sheet)"),
    }
    for name, (num_bytes, remark) in rows.items():
        table.add_row(name, f"{num_bytes / 1e9:.2f}", remark)
    table.columns[1].justify = "right"
    console.print(table, highlight=False)


def _show_programs(report: "DeploymentReport", console: Console) -> None:
    has_host = any(program.host is not None for program in report.programs)
    columns = (*_COLUMNS, *(_HOST_COLUMNS if has_host else ()), *_STEP_COLUMNS)
    table = Table("program", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == columns[-1] else "right", no_wrap=True)
    for program in report.programs:
        sums = ", ".join(f"{count:g} {name}" for name, count in program.collectives.items())
        cells = [
            f"{program.compile_s:.0f}",
            f"{program.temporary_bytes / 1e6:.0f}",
            "yes" if program.aliased_bytes >= report.pool_bytes else "NO",
            str(sum(program.pool_copies.values()) or "none"),
        ]
        if program.host is not None:
            cells += [str(program.host.waits), str(program.host.step_launches or "")]
        if program.step is not None:
            cells += [
                f"{program.step.flops / 1e9:.1f}",
                f"{program.step.num_bytes / 1e9:.2f}",
                f"{program.step.seconds * 1e3:.2f}",
                sums or "none",
            ]
        table.add_row(program.name, *cells)
    console.print(table, highlight=False)
    _say(
        console,
        f"a step: of one chip, every row over {report.context} tokens, by counting; ms by the"
        " roofline of the data sheet with assumed efficiencies, not measured",
    )


def _show_kernels(report: "DeploymentReport", console: Console) -> None:
    table = Table("kernel", box=None, pad_edge=False)
    for name in ("threads", "registers", "spilled B", "shared kB", "a multiprocessor holds"):
        table.add_column(name, justify="right", no_wrap=True)
    for kernel in report.gpu_kernels:
        table.add_row(
            kernel.name,
            str(kernel.threads),
            str(kernel.registers),
            str(kernel.spilled_bytes or "none"),
            f"{kernel.shared_bytes / 1024:.1f}",
            str(kernel.per_core),
        )
    console.print(table, highlight=False)


def _console() -> Console:
    """Tables are for a file as well, which has no width."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _write(path: Path, report: "DeploymentReport") -> None:
    try:
        path.write_text(report.to_json() + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"json: {str(path)!r}: {error.strerror}") from error
