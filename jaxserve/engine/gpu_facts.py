"""What a program compiled for a GPU does, read from the files that XLA dumps of it. Loads no JAX.

A program is a sequence of *thunks*, which the host goes through: it launches kernels, one by one or
many as a command buffer (a CUDA graph). Where a loop or a branch is decided outside a command
buffer, its condition is copied to the host first: some 20 us in which the device has nothing to do.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from jaxserve.errors import ConfigError

OPTIONS: Final[dict[str, Any]] = {
    "xla_gpu_autotune_level": 0,  # there is nothing to measure on
    "xla_dump_emitter_re": "ptx",  # releases of jax after 0.10 dump it when it is named
}
"""How XLA compiles for a GPU that is not there, so that what it dumps can be read here."""

# The former where passes changed anything.
_DUMPED: Final = ("*.thunk_sequence_after_thunk_passes.txt", "*.thunk_sequence.txt")

_THUNK: Final = re.compile(r"^( *)\d+: k(\w+)(?:.*\] (\w+) grid: .* shared_memory: (\d+) bytes)?")
_PALLAS: Final = re.compile(r'__gpu\$xla\.gpu\.triton".*?op_name="[^"]*?([^"/]+)/pallas_call')
_ENTRY: Final = re.compile(r"\.entry (\w+)\(")
_THREADS: Final = re.compile(r"^\.reqntid (\d+)", re.MULTILINE)
_TARGET: Final = re.compile(r"^\.target (\w+)", re.MULTILINE)
_REGISTERS: Final = re.compile(r"Used (\d+) registers")
_SPILLED: Final = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_DECIDED: Final = frozenset({"While", "Conditional"})
_NO_LAUNCH: Final = _DECIDED | {"CommandBuffer", "Sequential", "AsyncStart", "AsyncDone"}
_PTXAS: Final = ("nvidia.cu13", "nvidia.cuda_nvcc")  # packages that bring it, of CUDA 13 and 12


@dataclass(frozen=True, slots=True)
class HostWork:
    """`waits`: loops and branches that the host decides. `step_launches`: what a decoding step
    launches, branches apart; those of a command buffer count, too. 0 in a program without loop."""

    waits: int
    step_launches: int


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """A kernel as it was compiled. Registers are a thread's; bytes of shared memory a program's,
    spilled bytes a thread's."""

    name: str
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


class _Thunk(NamedTuple):
    kind: str
    kernel: str
    shared_bytes: int
    holders: frozenset[str]


def thunks(folder: Path) -> str:
    """The largest sequence of thunks that XLA dumped in `folder`, after its last pass over them.

    Small programs beside a large one are constants' and the like. Raises ConfigError for none, so
    that a release of XLA that names it otherwise is not taken for one that finds nothing.
    """
    for pattern in _DUMPED:
        if texts := [path.read_text() for path in folder.glob(pattern)]:
            return max(texts, key=len)
    raise ConfigError(f"topology: this release of XLA dumps no {_DUMPED[-1]}")


def host_work(sequence: str) -> HostWork:
    """Read what `thunks` found."""
    waits = launches = 0
    for thunk in _thunks(sequence):
        waits += thunk.kind in _DECIDED and "CommandBuffer" not in thunk.holders
        branch, loop = "Conditional" in thunk.holders, "While" in thunk.holders
        launches += loop and not branch and thunk.kind not in _NO_LAUNCH
    return HostWork(waits, launches)


def _thunks(text: str) -> Iterator[_Thunk]:
    """All thunks in order; what a thunk holds is indented below it."""
    holders: list[tuple[int, str]] = []
    for match in filter(None, map(_THUNK.match, text.splitlines())):
        indent, kind = len(match[1]), match[2]
        while holders and holders[-1][0] >= indent:
            holders.pop()
        yield _Thunk(kind, match[3] or "", int(match[4] or 0), frozenset(k for _, k in holders))
        holders.append((indent, kind))


def pallas_kernels(folder: Path, hlo: str) -> list[KernelFacts]:
    """The Pallas kernels of a program whose optimised HLO and dumps in `folder` these are.

    The assembler is asked again, since XLA does not say what it answered. Raises ConfigError when
    there is none, when it refuses a kernel, and when the dumps lack one.
    """
    names = set(_PALLAS.findall(hlo))
    shared_bytes = {thunk.kernel: thunk.shared_bytes for thunk in _thunks(thunks(folder))}
    found = []
    for path in sorted(folder.glob("*.ptx")):
        ptx = path.read_text()
        for entry in _ENTRY.findall(ptx):
            name = re.sub(r"_\d+$", "", entry)  # equal names are numbered
            if name in names:
                found.append(_assembled(name, ptx, shared_bytes.get(entry, 0)))
    if missing := names - {facts.name for facts in found}:
        raise ConfigError(f"topology: XLA dumped no PTX of {', '.join(sorted(missing))}")
    return found


@lru_cache(maxsize=256)  # most programs have the same kernels
def _assembled(name: str, ptx: str, shared_bytes: int) -> KernelFacts:
    """What the assembler says of a file of PTX with one kernel."""
    threads, target = _only(_THREADS, ptx), _only(_TARGET, ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [find_ptxas(), "-v", f"-arch={target}", source.name]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"kernel {name}: the assembler failed: {done.stderr.strip()}")
    stores, loads = _only(_SPILLED, done.stderr)
    return KernelFacts(
        name,
        threads=int(threads),
        registers=int(_only(_REGISTERS, done.stderr)),
        spilled_bytes=int(stores) + int(loads),
        shared_bytes=shared_bytes,
    )


def _only(pattern: re.Pattern[str], text: str) -> Any:
    """What a pattern finds, once; what is said otherwise is not known here."""
    match pattern.findall(text):
        case [found]:
            return found
        case many:
            raise ConfigError(
                f"topology: found {pattern.pattern!r} {len(many)} times, wanted 1; this release"
                " of XLA or ptxas is not known"
            )


def find_ptxas() -> str:
    """NVIDIA's assembler, of a package or of the system. Raises ConfigError for none."""
    for package in _PTXAS:
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:  # of its parent
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / "bin" / "ptxas").exists():
                return str(path)
    if path := shutil.which("ptxas"):
        return path
    raise ConfigError(
        "topology: needs ptxas, NVIDIA's assembler; try pip install 'jaxserve[gpu-compile]'"
    )
