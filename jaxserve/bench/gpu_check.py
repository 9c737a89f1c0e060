"""One command's worth of checks on a machine with a GPU: is it right, and how fast is it.

Each part is a process of its own, with a time limit: what one part breaks, or the memory it holds,
is no matter to the next. Without a GPU every part runs at tiny sizes on the CPU, which proves the
way and says nothing of speed. Knows what parts measure, and how their numbers are compared.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from jaxserve import flag_table
from jaxserve.flags import Settings, parse

Numbers = dict[str, Any]


class Part(NamedTuple):
    """A part of the check, what it measures within `seconds`, and when it is given up."""

    run: Callable[[float], Numbers]
    seconds: float
    limit_s: float


def _is_tiny() -> bool:
    from jaxserve.bench.kernels import on_cpu

    return on_cpu()


def correctness(seconds: float) -> Numbers:
    """Kernels against float64, over as much of the option matrix as time allows."""
    from jaxserve.bench.kernel_check import MATRIX, check_many, limit

    tiny = _is_tiny()
    threads = 1 if tiny else len(os.sched_getaffinity(0))
    results = list(check_many(seconds=seconds, interpret=tiny, threads=threads))
    wrong = [
        f"{','.join(map(str, options))}: {error if isinstance(error, str) else f'{error:.1e}'}"
        for options, error in results
        if isinstance(error, str) or not error <= limit(options.stored)
    ]
    errors: dict[str, float] = {}
    for options, error in results:
        if not isinstance(error, str):
            errors[options.stored] = max(errors.get(options.stored, 0.0), error)
    return {"checked": len(results), "of": len(MATRIX), "wrong": wrong, "worst_error": errors}


def kernel_speed(seconds: float) -> Numbers:
    """Kernels beside the copy bandwidth, the matrix rate and other libraries."""
    from jaxserve.bench import kernels

    tiny = _is_tiny()
    sizes = kernels.TINY if tiny else kernels.FULL
    rates = kernels.measure_rates(sizes)
    return kernels.as_json(rates, kernels.measure(sizes, rates), tiny=tiny)


# Rows and tokens of context of the slices to time.
_STEPS: Final = ((64, 1024), (256, 1024))
_TINY_STEPS: Final = ((2, 32), (8, 48))
_SLICE_STEPS: Final = 16


def _deployment(tiny: bool, *, rows: int, prompt_tokens: int) -> list[str]:
    """Flags of a deployment with so many rows and prompt tokens per step."""
    return [
        f"--model=random:{'tiny' if tiny else 'llama3-8b'}",
        f"--max_rows={8 if tiny else rows}",
        f"--max_prefill_tokens={prompt_tokens}",
        f"--page_size={16 if tiny else 64}",
        "--mesh=tp=1",
        "--kernels=auto",
        f"--compilation_cache={os.environ.get(_CACHE, '')}",
    ]


def _settings(arguments: list[str]) -> Settings:
    """What `jaxserve profile` would make of these flags."""
    groups = (flag_table.PROFILING, flag_table.MODEL, flag_table.PROGRAMS, flag_table.MEMORY)
    return parse(groups, arguments, environment={}, known=set())


def engine(seconds: float) -> Numbers:
    """Decode steps of whole slices, and what weights, keys and products would take at least.

    The bytes and FLOPs are those of the computed profiles: every weight and every row's keys read
    once. It takes as long as building a deployment does, not `seconds`.
    """
    from jaxserve.config import EngineConfig
    from jaxserve.engine.build import TILE, build_jax, serving_buckets
    from jaxserve.engine.measure import Limits, Point, SliceBench
    from jaxserve.models.profile import ModelShape
    from jaxserve.models.sources import load_model_config, parse_source
    from jaxserve.schedulers.estimators.roofline_time import DEVICES, RooflineTime

    tiny = _is_tiny()
    flags = _deployment(tiny, rows=max(_STEPS)[0], prompt_tokens=64)
    config = _settings(flags).record(EngineConfig)
    source = parse_source(config.model)
    model = load_model_config(source)
    began_s = time.monotonic()
    executor, info, _ = build_jax(config, source, model, lambda line: print(line, flush=True))
    build_s = time.monotonic() - began_s
    limits = Limits(
        buckets=serving_buckets(config),
        tile=TILE,
        max_rows=config.scheduler.max_rows,
        max_steps=config.scheduler.make_slicing(max_context=model.max_context).max_steps,
        max_context=model.max_context,
        page_size=info.page_size,
        num_pages=info.num_pages,
    )
    bench = SliceBench(executor, limits)
    # Bytes and products are the model's; the data sheet's rates are not read.
    sizes = ModelShape.of(model).sizes(info.dtype, config.cache.kv_dtype)
    counts = RooflineTime(sizes=sizes, device=DEVICES["h200"], num_devices=1)
    steps = []
    for rows, context in _TINY_STEPS if tiny else _STEPS:
        point = Point(_SLICE_STEPS, (context,) * rows)
        bench.run(point)
        times = [bench.run(point)[1] / _SLICE_STEPS for _ in range(5)]
        attended = rows * (context + _SLICE_STEPS / 2)
        steps.append(
            {
                "rows": rows,
                "context": context,
                "step_s": statistics.median(times),
                "bytes": counts.step_bytes(rows, rows, attended),
                "flops": counts.step_flops(rows, rows, attended),
            }
        )
    return {
        "model": config.model,
        "dtype": info.dtype,
        "kernels": info.kernels,
        "num_pages": info.num_pages,
        "build_s": build_s,
        "steps": steps,
    }


def profile(seconds: float) -> Numbers:
    """`jaxserve profile` of a smaller deployment, as JSON: it measures every program many times."""
    from jaxserve.bench.profile import main

    tiny = _is_tiny()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "profile.json"
        flags = [
            *_deployment(tiny, rows=16, prompt_tokens=512),
            f"--minutes={seconds / 60}",
            f"--output={path}",
        ]
        code = main(_settings(flags))
        if code:
            raise SystemExit(code)
        return {"profile": json.loads(path.read_text())}


_CACHE: Final = "GPU_CHECK_CACHE"

# Limits add up to less than nine minutes.
PARTS: Final[dict[str, Part]] = {
    "correctness": Part(correctness, 100, 140),
    "kernels": Part(kernel_speed, 60, 110),
    "engine": Part(engine, 30, 160),
    "profile": Part(profile, 25, 120),
}


def run_part(name: str, output: str, *, quick: bool) -> None:
    """Run one part in this process and write its numbers."""
    part = PARTS[name]
    numbers = part.run(5.0 if quick else part.seconds)
    Path(output).write_text(json.dumps(numbers))


def run_all(command: Callable[[str, str], list[str]], *, say: Callable[[str], None]) -> Numbers:
    """Run every part by `command(part, file to write)`; a part that fails has an "error"."""
    numbers: Numbers = {}
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {_CACHE: f"{directory}/compiled"}
        for name, part in PARTS.items():
            began_s = time.monotonic()
            say(f"{name}: at most {part.limit_s:.0f} s")
            path = Path(directory) / f"{name}.json"
            try:
                subprocess.run(
                    command(name, str(path)),
                    check=True,
                    timeout=part.limit_s,
                    env=environment,
                    stdout=sys.stderr,
                )
                numbers[name] = json.loads(path.read_text())
            except subprocess.TimeoutExpired:
                numbers[name] = {"error": f"took longer than {part.limit_s:.0f} s"}
            except subprocess.CalledProcessError as error:
                numbers[name] = {"error": f"exit code {error.returncode}; its output is above"}
            numbers[name]["seconds"] = time.monotonic() - began_s
    _add_rooflines(numbers)
    return numbers


def _add_rooflines(numbers: Numbers) -> None:
    """What a step takes at least at the rates that the kernel part measured."""
    rates = numbers["kernels"].get("rates")
    for step in numbers["engine"].get("steps", []) if rates else []:
        memory_s = step["bytes"] / rates["copy_bytes_per_s"]
        compute_s = step["flops"] / rates["matrix_flops_per_s"]
        step["roofline_s"] = max(memory_s, compute_s)
        step["bound"] = "memory" if memory_s > compute_s else "compute"
        step["share"] = step["roofline_s"] / step["step_s"]


def passed(numbers: Numbers) -> bool:
    """Whether every part ran, and no kernel was wrong."""
    ran = not any("error" in part for part in numbers.values())
    return ran and not numbers["correctness"]["wrong"] and numbers["correctness"]["checked"] > 0


def summary(numbers: Numbers) -> Iterator[str]:
    """The short table."""
    for name, part in numbers.items():
        if "error" in part:
            yield f"{name:12s} FAILED: {part['error']}"
    if "error" not in (part := numbers["correctness"]):
        worst = ", ".join(f"{name} {error:.1e}" for name, error in part["worst_error"].items())
        yield f"correctness  {part['checked']} of {part['of']} kernels; largest error: {worst}"
        yield from (f"correctness  WRONG {line}" for line in part["wrong"][:10])
    if "error" not in (part := numbers["kernels"]):
        rates = part["rates"]
        yield (
            f"device       {part['device']}, copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s,"
            f" bf16 product {rates['matrix_flops_per_s'] / 1e12:.1f} TFLOP/s"
        )
        for row in part["rows"]:
            share = row["copy_share"] or row["matrix_share"]
            text = f"{row['seconds'] * 1e6:9.1f} us {share:6.1%}" if share else row["note"]
            yield f"kernel       {row['kernel']:12s} {row['shape']:22s} {text}"
    if "error" not in (part := numbers["engine"]):
        for step in part["steps"]:
            line = f"step         {step['rows']} x {step['context']}: {step['step_s'] * 1e3:.2f} ms"
            if "share" in step:
                line += f", roofline {step['roofline_s'] * 1e3:.2f} ms ({step['bound']})"
                line += f", {step['share']:.1%}"
            yield f"{line}; {part['kernels']['paged_attention']}"
    if "error" not in (part := numbers["profile"]):
        errors = part["profile"]["errors"]["held_out"]
        yield f"profile      held-out slices are off by {errors['mean']:.1%} on average"
