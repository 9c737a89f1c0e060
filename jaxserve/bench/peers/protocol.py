"""What a peer is told and what it answers: arguments in, one JSON line per measurement out.

Knows no engine. Lines on standard output that are no JSON object are the engine's own chatter and
are passed over by `parse`.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxserve.bench.peers.workload import NUM_REQUESTS

MODES: Final = ("greedy", "sampled")
TEMPERATURE: Final = 0.8
TOP_K: Final = 50
TOP_P: Final = 0.95
DECODE_POINTS: Final = ((1, 128), (16, 128), (16, 512), (64, 128), (64, 512))
"""(rows, context) at which decode alone is timed."""

WINDOW: Final = (0.1, 0.9)
WINDOW_TEXT: Final = "steady window: from 10 % to 90 % of the useful output tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadResult:
    """One run of the whole workload. `wall_s` is from the first submission to the last token."""

    peer: str
    mode: str
    useful_tokens: int
    wall_s: float
    window_tokens_per_s: float
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Useful output tokens per second, end to end."""
        return self.useful_tokens / self.wall_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeResult:
    """Decode alone: all rows at one context length, token choice (greedy) included."""

    peer: str
    rows: int
    context: int
    tokens_per_s: float
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One attention kernel on one decode step; without `seconds`, `note` says why.

    `error` is the largest of a row over its largest number, beside float64.
    """

    peer: str
    shape: str
    seconds: float | None = None
    error: float | None = None
    note: str = ""


Result = WorkloadResult | DecodeResult | KernelResult
_KINDS: Final[dict[str, type[Result]]] = {
    "workload": WorkloadResult,
    "decode": DecodeResult,
    "kernel": KernelResult,
}


def emit(result: Result) -> None:
    """Prints one result line at once, so that a peer that dies later loses nothing."""
    kind = next(kind for kind, record in _KINDS.items() if isinstance(result, record))
    print(json.dumps({"kind": kind, **dataclasses.asdict(result)}), flush=True)


def parse(line: str) -> Result | None:
    """The result on a line, or None for a line that carries none."""
    if not line.startswith('{"kind"'):
        return None
    fields = json.loads(line)
    return _KINDS[fields.pop("kind")](**fields)


def first_line(error: BaseException) -> str:
    """What a table says of an error: its type and the beginning of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


class Meter:
    """Collects when useful tokens came; makes the result of a run."""

    def __init__(self, now_s: Callable[[], float] = time.perf_counter):
        self._now_s = now_s
        self._started_s = now_s()
        self._times_s: list[float] = []
        self._tokens: list[int] = []

    def add(self, num_tokens: int, *, at_s: float | None = None) -> None:
        """`num_tokens` useful tokens came now, or at a time of the same clock."""
        self._times_s.append(self._now_s() if at_s is None else at_s)
        self._tokens.append(num_tokens)

    def result(self, peer: str, mode: str, *, config: dict[str, Any]) -> WorkloadResult:
        """The run that ended with the last token added."""
        order = np.argsort(self._times_s, kind="stable")
        times_s = np.asarray(self._times_s)[order]
        done = np.cumsum(np.asarray(self._tokens)[order])
        first, last = np.searchsorted(done, [share * done[-1] for share in WINDOW])
        # A run so short that its window is one instant (one batch) has only its whole length.
        window_s = times_s[last] - times_s[first]
        wall_s = float(times_s[-1] - self._started_s)
        rate = (done[last] - done[first]) / window_s if window_s > 0 else done[-1] / wall_s
        return WorkloadResult(
            peer=peer,
            mode=mode,
            useful_tokens=int(done[-1]),
            wall_s=wall_s,
            window_tokens_per_s=float(rate),
            config=config,
        )


def peer_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments every peer takes; a peer may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model_dir", type=Path, required=True, help="written by weights.py")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--repeats", type=int, default=1, help="runs of the workload per mode")
    parser.add_argument("--seed", type=int, default=0, help="of the workload")
    return parser


def num_cores() -> int:
    """Cores this process may run on: the caller pins it, and an engine gets one thread each."""
    return len(os.sched_getaffinity(0))
