"""One command's worth of checks on a machine with a GPU: is it right, and how fast is it.

Each part is a process of its own, with a time limit: what one part breaks, or the memory it holds,
is no matter to the next, and what a part had measured when it was stopped is kept. Without a GPU
every part runs at tiny sizes on the CPU, which proves the way and says nothing of speed. Knows the
parts, their limits and how their numbers are compared.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from jaxserve.bench import gpu_parts
from jaxserve.bench.gpu_parts import Numbers, Report
from jaxserve.bench.peers.decode_shapes import FULL, TINY, read_bytes
from jaxserve.bench.peers.report import OURS
from jaxserve.errors import ConfigError


class Part(NamedTuple):
    """A part of the check, what it measures within `seconds`, and when it is given up.

    What a part leaves of its limit, later ones may use; one that `stretches` measures for longer
    then. `ours` are the parts that must succeed, `holds_memory` those that take the device's memory
    at the start, as serving does. `xla_flags` are added to those that all parts have.
    """

    run: Callable[[float, Report], None]
    seconds: float
    limit_s: float
    ours: bool = True
    holds_memory: bool = False
    stretches: bool = False
    xla_flags: str = ""


# Adds loops to what XLA makes CUDA graphs of, which leaves a whole slice to the device. The host
# need not wait for each step then; whether that is faster, and right, is what is asked. Such a loop
# is one command to XLA (jax 0.10.2), and fewer than five in a row make no graph: a short program
# would lose the graph in its loop's body. A slice has more around its loop, which a test holds.
_LOOPS_IN_GRAPHS: Final = "--xla_gpu_enable_command_buffer=+WHILE"

# Limits add up to less than nine minutes. The option matrix is as large as time is left: last.
PARTS: Final[dict[str, Part]] = {
    "device": Part(gpu_parts.device, 0, 40),
    "kernels": Part(gpu_parts.kernels, 30, 60),
    "sampling": Part(gpu_parts.sampling, 0, 40),
    "engine": Part(gpu_parts.engine, 60, 120, holds_memory=True),
    "graphs": Part(
        gpu_parts.graphs, 0, 45, ours=False, holds_memory=True, xla_flags=_LOOPS_IN_GRAPHS
    ),
    "transformers": Part(gpu_parts.transformers, 30, 60, ours=False),
    "libraries": Part(gpu_parts.libraries, 30, 60, ours=False),
    "profile": Part(gpu_parts.profile, 20, 75, holds_memory=True),
    "correctness": Part(gpu_parts.correctness, 5, 35, stretches=True),
}

SAMPLED_BOUND: Final = 0.9
"""Of greedy decode's tokens per second, what sampled decode is to reach."""

_SAMPLED: Final = (
    f"sampled (temperature {gpu_parts.SAMPLED.temperature}, top_p {gpu_parts.SAMPLED.top_p})"
)
_CONFIG_ERROR: Final = 2
_SPARE: Final = "GPU_CHECK_SPARE_S"  # environment variable: seconds that earlier parts left


def run_part(name: str, output: str, *, quick: bool) -> int:
    """Run one part in this process and write its numbers; returns the exit code."""
    part, report = PARTS[name], Report(output)
    spare_s = float(os.environ.get(_SPARE, "0")) if part.stretches else 0.0
    try:
        part.run(5.0 if quick else part.seconds + spare_s, report)
    except ConfigError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        report.save(error=str(error))
        return _CONFIG_ERROR
    return 0


def run_all(
    command: Callable[[str, str], list[str]],
    *,
    say: Callable[[str], None],
    save: Callable[[Numbers], None] = lambda numbers: None,
    peers_python: str = "",
) -> Numbers:
    """Run every part by `command(part, file to write)`; a part that fails has an "error".

    `save` is called after every part with the numbers so far. Where JAX does not see the device
    nothing else runs.
    """
    numbers: Numbers = {}
    spare_s = 0.0
    with tempfile.TemporaryDirectory() as directory:
        shared = {
            gpu_parts.CACHE: f"{directory}/compiled",
            gpu_parts.PEERS_PYTHON: peers_python,
            # No connection may be at hand, and nothing is to be fetched.
            "HF_HUB_OFFLINE": "1",
        }
        for name, part in PARTS.items():
            began_s, limit_s = time.monotonic(), part.limit_s + spare_s
            say(f"{name}: at most {limit_s:.0f} s")
            path = Path(directory) / f"{name}.json"
            environment = os.environ | shared | {_SPARE: str(spare_s)}
            if not part.holds_memory:
                environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            if part.xla_flags:
                flags = environment.get("XLA_FLAGS", "")
                environment["XLA_FLAGS"] = f"{flags} {part.xla_flags}".strip()
            failure = _run(command(name, str(path)), limit_s, environment)
            numbers[name] = json.loads(path.read_text()) if path.exists() else {}
            blind = name == "device" and "error" in numbers[name]
            if failure:
                numbers[name] = {"error": _told(failure, numbers[name])} | numbers[name]
            numbers[name]["seconds"] = time.monotonic() - began_s
            spare_s = max(0.0, limit_s - numbers[name]["seconds"])
            _compare(numbers)
            save(numbers)
            if blind:
                break
    return numbers


def _told(failure: str, numbers: Numbers) -> str:
    doing = numbers.get("doing")
    return f"{failure}; it said last: {doing}" if doing else failure


def _run(command: list[str], limit_s: float, environment: dict[str, str]) -> str:
    """Run a process and what it starts, compilers included, for so long; why it failed, or ""."""
    with subprocess.Popen(
        command, env=environment, stdout=sys.stderr, start_new_session=True
    ) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"took longer than {limit_s:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    return f"exit code {code}; its output is above" if code else ""


def _compare(numbers: Numbers) -> None:
    """Put beside each other what several parts measured."""
    steps = numbers.get("engine", {}).get("steps", [])
    for step in steps:
        step["sampled_rate"] = step["step_s"] / step["sampled_step_s"]
    _add_sampled_rates(numbers.get("sampling", {}), steps)
    _add_ratios(numbers.get("graphs", {}).get("steps", []), steps)
    rates = numbers.get("kernels", {}).get("rates")
    if rates:
        _add_rooflines(steps, rates)
        sizes = TINY if numbers["kernels"].get("interpreted_at_tiny_sizes") else FULL
        lengths = dict(sizes.decode)
        for row in numbers.get("libraries", {}).get("rows", []):
            if row["seconds"] is not None:
                row["bytes_per_s"] = read_bytes(sizes, lengths[row["shape"]]) / row["seconds"]
                row["copy_share"] = row["bytes_per_s"] / rates["copy_bytes_per_s"]
    ours, theirs = (best_rate(numbers.get(name, {})) for name in ("engine", "transformers"))
    if ours and theirs:
        numbers["transformers"]["ratio"] = ours / theirs


def _add_rooflines(steps: list[Numbers], rates: Numbers) -> None:
    """What a step takes at least at the rates that the kernel part measured."""
    for step in steps:
        memory_s = step["bytes"] / rates["copy_bytes_per_s"]
        compute_s = step["flops"] / rates["matrix_flops_per_s"]
        step["roofline_s"] = max(memory_s, compute_s)
        step["bound"] = "memory" if memory_s > compute_s else "compute"
        step["share"] = step["roofline_s"] / step["step_s"]


def _add_sampled_rates(sampling: Numbers, steps: list[Numbers]) -> None:
    """Of greedy decode's rate, what each kind of row would leave: by the kernel's time, where the
    engine has measured a step of as many rows."""
    rows = sampling.get("rows", [])
    times = [step["step_s"] for step in steps if step["rows"] == sampling.get("count")]
    if not times or not rows or rows[0]["kind"] != "greedy":
        return
    for row in rows:
        if rows[0]["kernel_s"] is not None and row["kernel_s"] is not None:
            extra_s = row["kernel_s"] - rows[0]["kernel_s"]
            row["sampled_rate"] = times[0] / (times[0] + extra_s)


def _add_ratios(graphs: list[Numbers], steps: list[Numbers]) -> None:
    """What a step takes in a CUDA graph over what the engine part's took, and the share of rows
    whose tokens are the same."""
    for step in graphs:
        for other in steps:
            if (other["rows"], other["context"]) == (step["rows"], step["context"]):
                step["ratio"] = step["step_s"] / other["step_s"]
                words = list(zip(step["tokens"].split(), other["tokens"].split(), strict=True))
                step["same_tokens"] = sum(a == b for a, b in words) / len(words)


def best_rate(part: Numbers) -> float | None:
    """Tokens per second of the best run of a batch, None without any."""
    return max((run["tokens_per_s"] for run in part.get("runs", [])), default=None)


def passed(numbers: Numbers) -> bool:
    """Whether every part of ours ran, and no kernel of ours was wrong or without a time."""
    parts = {name: numbers.get(name, {"error": "did not run"}) for name in PARTS}
    if any("error" in parts[name] for name, part in PARTS.items() if part.ours):
        return False
    times = [row["seconds"] for row in parts["kernels"]["rows"] if row["kernel"] == OURS]
    sampling_times = [row["kernel_s"] for row in parts["sampling"]["rows"]]
    timed = times and sampling_times and None not in times + sampling_times
    checks = [parts["correctness"], parts["sampling"]]
    return bool(timed) and all(each["checked"] > 0 and not each["wrong"] for each in checks)


def summary(numbers: Numbers) -> Iterator[str]:
    """The short table: what was measured, also of parts that failed."""
    for name, part in numbers.items():
        if "error" in part:
            yield f"{name:12s} FAILED: {part['error']}"
    for name, lines in _LINES.items():
        yield from lines(numbers.get(name, {}))


def _correctness_lines(part: Numbers) -> Iterator[str]:
    if part.get("checked"):
        worst = ", ".join(f"{name} {error:.1e}" for name, error in part["worst_error"].items())
        yield f"correctness  {part['checked']} of {part['of']} kernels; largest error: {worst}"
        yield from (f"correctness  WRONG {line}" for line in part["wrong"][:10])


def _sampling_lines(part: Numbers) -> Iterator[str]:
    if part.get("checked"):
        yield (
            f"sampling     {part['checked']} of {part['of']} kinds of rows;"
            f" {part['at_boundary']} draws on a boundary, which rounding decides"
        )
        yield from (f"sampling     WRONG {line}" for line in part["wrong"][:10])
    for row in part.get("rows", []):
        line = f"sampling     {part['count']} x {part['vocabulary']} {row['kind']:16s}"
        if row["kernel_s"] is not None:
            line += f"{row['kernel_s'] * 1e6:9.1f} us"
        if "sampled_rate" in row:
            line += f", decode {_beside_bound(row['sampled_rate'])}"
        if row["xla_s"] is not None:
            line += f"; XLA {row['xla_s'] * 1e6:.1f} us"
        yield f"{line} {row['note']}".rstrip()


def _beside_bound(rate: float) -> str:
    missed = "" if rate >= SAMPLED_BOUND else ", MISSED"
    return f"{rate:.2f}x of greedy (bound {SAMPLED_BOUND}{missed})"


def _kernel_lines(part: Numbers) -> Iterator[str]:
    if "rates" in part:
        rates = part["rates"]
        yield (
            f"device       {part['device']}, copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s,"
            f" bf16 product {rates['matrix_flops_per_s'] / 1e12:.1f} TFLOP/s"
        )
    for row in part.get("rows", []):
        share = row["copy_share"] or row["matrix_share"]
        yield _kernel_line(row["kernel"], row["shape"], row["seconds"], share, row["note"])


def _library_lines(part: Numbers) -> Iterator[str]:
    if "note" in part:
        yield f"libraries    {part['note']}"
    for row in part.get("rows", []):
        shape = f"decode {row['shape']}" if row["shape"] else ""
        yield _kernel_line(row["peer"], shape, row["seconds"], row.get("copy_share"), row["note"])


def _kernel_line(
    kernel: str, shape: str, seconds: float | None, share: float | None, note: str
) -> str:
    time_ = "" if seconds is None else f"{seconds * 1e6:9.1f} us "
    share_ = "" if share is None else f"{share:6.1%} "
    return f"kernel       {kernel:12s} {shape:22s} {time_}{share_}{note}".rstrip()


def _engine_lines(part: Numbers) -> Iterator[str]:
    for step in part.get("steps", []):
        line = f"step         {step['rows']} x {step['context']}: {step['step_s'] * 1e3:.2f} ms"
        if "share" in step:
            line += f", roofline {step['roofline_s'] * 1e3:.2f} ms ({step['bound']})"
            line += f", {step['share']:.1%}"
        yield f"{line}; {part['kernels']['paged_attention']}"
        yield (
            f"step         {step['rows']} x {step['context']} {_SAMPLED}:"
            f" {step['sampled_step_s'] * 1e3:.2f} ms, {_beside_bound(step['sampled_rate'])}"
        )
    if part.get("runs"):
        batch = part["batch"]
        yield (
            f"batch        {batch['count']} x ({batch['prompt_tokens']} + {batch['output_tokens']})"
            f" tokens: {best_rate(part):,.0f} tokens/s"
        )


def _graphs_lines(part: Numbers) -> Iterator[str]:
    for step in part.get("steps", []):
        line = f"graphs       {step['rows']} x {step['context']}: {step['step_s'] * 1e3:.2f} ms"
        if "ratio" in step:
            line += f", {step['ratio']:.3f} of a step whose loop the host drives"
            line += f"; tokens of {step['same_tokens']:.0%} of rows are the same"
        yield line


def _transformers_lines(part: Numbers) -> Iterator[str]:
    if "note" in part:
        yield f"transformers {part['note']}"
    if part.get("runs"):
        line = f"transformers the same batch: {best_rate(part):,.0f} tokens/s"
        ratio = f", ours is {part['ratio']:.2f} times that" if "ratio" in part else ""
        yield line + ratio


def _profile_lines(part: Numbers) -> Iterator[str]:
    if "profile" in part:
        errors = part["profile"]["errors"]["held_out"]
        yield f"profile      held-out slices are off by {errors['mean']:.1%} on average"


_LINES: Final[dict[str, Callable[[Numbers], Iterator[Any]]]] = {
    "correctness": _correctness_lines,
    "sampling": _sampling_lines,
    "kernels": _kernel_lines,
    "libraries": _library_lines,
    "engine": _engine_lines,
    "graphs": _graphs_lines,
    "transformers": _transformers_lines,
    "profile": _profile_lines,
}
