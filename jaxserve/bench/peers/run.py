"""Starts peers as processes of their own Python, pinned to cores, and collects their results.

Knows no engine: a peer is a module and its arguments. The peers' packages are heavy and not
jaxserve's, so they live in another virtual environment; this package is put on its path.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import jaxserve
from jaxserve.bench.peers.protocol import Result, parse
from jaxserve.bench.peers.report import OURS
from jaxserve.errors import ConfigError

REQUIREMENTS: Final = {  # module -> what pip calls it
    "torch": "torch==2.13.0",
    "transformers": "transformers==5.23.*",
    "accelerate": "accelerate",
    "llama_cpp": "llama-cpp-python==0.3.36",
    "gguf": "gguf",
    "safetensors": "safetensors",
}

PEERS: Final[dict[str, tuple[str, ...]]] = {
    OURS: ("jaxserve_peer",),
    "llama.cpp": ("llama_cpp_peer",),
    "transformers static": ("transformers_peer", "--batching=static"),
    "transformers continuous": ("transformers_peer", "--batching=continuous"),
}
"""Name -> module of this package and the arguments that make it this peer."""

QUIET_LOAD: Final = 0.5

_SOURCE_ROOT: Final = Path(jaxserve.__file__).parents[1]
_PACKAGE: Final = __package__ or "jaxserve.bench.peers"


class PeerFailed(Exception):
    """A peer's process ended with an error; the message holds its last lines."""


def missing_modules(python: str, modules: Iterable[str]) -> list[str]:
    """Those of `modules` that `python` cannot import. Raises ConfigError when it does not run."""
    probe = (
        "import importlib.util as u, sys;"
        "print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
    )
    try:
        answer = subprocess.run(
            [python, "-c", probe, *modules], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"peers_python: got {python!r}, which does not run: {error}") from error
    return answer.stdout.split()


def require_modules(python: str) -> None:
    """Raises ConfigError naming what to install where `python` lacks a peer's package."""
    missing = [REQUIREMENTS[module] for module in missing_modules(python, REQUIREMENTS)]
    if missing:
        quoted = " ".join(f"'{name}'" for name in missing)
        raise ConfigError(
            f"peers_python: {python} lacks packages; try: {python} -m pip install {quoted}"
        )


def busy_warning() -> str | None:
    """A line to print where other work runs here, which no ratio survives.

    Engines that wait by spinning (OpenMP: llama.cpp, torch) lose most: one thread put off its core
    holds up the other at every barrier, so noise flatters whoever does not spin.
    """
    load = os.getloadavg()[0]
    if load < QUIET_LOAD:
        return None
    return f"load average {load:.1f}: other work runs here, so rates and ratios mean little"


def write_model(python: str, *, shape: str, directory: Path) -> None:
    """Writes the random model `shape` for all peers (`weights.py`), in the peers' Python."""
    for _ in _lines(python, ["weights", f"--shape={shape}", f"--out={directory}"], cores=()):
        pass


def run_peer(
    python: str, name: str, arguments: Sequence[str], *, cores: Collection[int]
) -> Iterator[Result]:
    """Yields a peer's results as it prints them. Raises PeerFailed when it ends with an error.

    jaxserve itself runs in this process's Python, the others in `python`.
    """
    python = sys.executable if name == OURS else python
    module, *fixed = PEERS[name]
    yield from run_module(python, module, [*fixed, *arguments], cores=cores)


def run_module(
    python: str, module: str, arguments: Sequence[str], *, cores: Collection[int] = ()
) -> Iterator[Result]:
    """Yields what a module of this package prints as results, run by `python`. Raises PeerFailed
    when it ends with an error."""
    for line in _lines(python, [module, *arguments], cores=cores):
        result = parse(line)
        if result is not None:
            yield result


def _path_of(python: str) -> str:
    """PYTHONPATH with this package; what else stands in it fits this process's Python alone."""
    inherited = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    return os.pathsep.join(filter(None, [str(_SOURCE_ROOT), inherited]))


def _lines(python: str, command: Sequence[str], *, cores: Collection[int]) -> Iterator[str]:
    def pin() -> None:
        os.sched_setaffinity(0, cores)

    module, *arguments = command
    last_lines: deque[str] = deque(maxlen=15)
    with subprocess.Popen(
        [python, "-m", f"{_PACKAGE}.{module}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": _path_of(python)},
        # Before the engine's libraries count the cores they may use; JAX warns of it.
        preexec_fn=pin if cores else None,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last_lines.append(line)
            yield line
    if process.returncode:
        raise PeerFailed(
            f"{module} {' '.join(arguments)} ended with status {process.returncode}:\n"
            + "".join(last_lines)
        )
