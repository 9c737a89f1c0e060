"""What each part of `scripts/gpu_check` measures, in a process of its own.

A part hands over what it has measured as it goes, so that a process that dies or runs out of time
loses only the rest. Knows what is measured; limits, comparisons and tables are gpu_check.py's.
"""

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from jaxserve import flag_table
from jaxserve.bench.peers import run
from jaxserve.bench.peers.decode_shapes import FULL, TINY, Sizes
from jaxserve.bench.peers.protocol import KernelResult, WorkloadResult
from jaxserve.bench.peers.workload import Request, equal_requests
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings, parse
from jaxserve.request import SamplingParams

Numbers = dict[str, Any]

CACHE: Final = "GPU_CHECK_CACHE"
"""Environment variable: a directory for compiled programs that the parts share."""
PEERS_PYTHON: Final = "GPU_CHECK_PEERS_PYTHON"
"""Environment variable: the Python that has torch and transformers."""

_SAVE_EVERY_S: Final = 1.0


class Report:
    """The numbers of a part, in its file from the first on.

    `save` writes at once; `numbers` may be changed before it, and `save_now_and_then` spares the
    disk where there are many.
    """

    def __init__(self, path: str | Path):
        self.numbers: Numbers = {}
        self._path, self._saved_s = Path(path), 0.0

    def save(self, **numbers: Any) -> None:
        """Take these up, and write all. A reader sees the file before or after, never between."""
        self.numbers |= numbers
        draft = self._path.with_suffix(".part")
        draft.write_text(json.dumps(_finite(self.numbers)))
        draft.replace(self._path)
        self._saved_s = time.monotonic()

    def save_now_and_then(self) -> None:
        if time.monotonic() > self._saved_s + _SAVE_EVERY_S:
            self.save()

    def say(self, line: str) -> None:
        """A line for the person who waits, kept as what the part was doing."""
        print(line, file=sys.stderr, flush=True)
        self.save(doing=line)


def _finite(numbers: Any) -> Any:
    """The same, with None for infinities and for what is no number: JSON knows neither."""
    if isinstance(numbers, dict):
        return {name: _finite(value) for name, value in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return [_finite(value) for value in numbers]
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def wants_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and JAX was not told to leave it alone."""
    there = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    return there and os.environ.get("JAX_PLATFORMS", "") != "cpu"


def check_jax() -> None:
    """Raises ConfigError on a machine with a GPU that this Python's JAX does not see."""
    import jax

    if wants_gpu() and jax.default_backend() != "gpu":
        raise ConfigError(
            "this machine has an NVIDIA GPU, but this Python's jax runs on"
            f" {jax.default_backend()}; try: pip install 'jax[cuda12]' (or 'jax[cuda13]', as the"
            " driver allows); JAX_PLATFORMS=cpu runs everything at tiny sizes on the CPU"
        )


def _sizes() -> Sizes:
    return FULL if wants_gpu() else TINY


def device(seconds: float, report: Report) -> None:
    """What JAX sees."""
    import jax

    check_jax()
    first = jax.devices()[0]
    memory = first.memory_stats() or {}
    report.save(
        device=first.device_kind,
        jax=jax.__version__,
        bytes_limit=memory.get("bytes_limit"),
        tiny=not wants_gpu(),
    )


_MOST_PROCESSES: Final = 16  # each takes half a GiB of the GPU for its context


def correctness(seconds: float, report: Report) -> None:
    """Kernels against float64, over as much of the option matrix as time allows."""
    from jaxserve.bench.kernel_check import MATRIX, check_in_processes, limit

    check_jax()
    tiny = not wants_gpu()
    processes = 1 if tiny else min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    wrong: list[str] = []
    errors: dict[str, float] = {}
    report.save(checked=0, of=len(MATRIX), wrong=wrong, worst_error=errors)
    checks = check_in_processes(seconds=seconds, interpret=tiny, processes=processes)
    for options, error in checks:
        report.numbers["checked"] += 1
        if isinstance(error, str) or not error <= limit(options.stored):
            text = error if isinstance(error, str) else f"{error:.1e}"
            wrong.append(f"{','.join(map(str, options))}: {text}")
        if not isinstance(error, str) and math.isfinite(error):
            errors[options.stored] = max(errors.get(options.stored, 0.0), error)
        report.save_now_and_then()
    report.save()


def kernels(seconds: float, report: Report) -> None:
    """Our kernels and JAX's beside the copy bandwidth and the matrix rate."""
    from jaxserve.bench.kernels import as_json, measure, measure_rates

    check_jax()
    sizes = _sizes()
    rates = measure_rates(sizes)
    rows: list[Numbers] = []
    report.save(**as_json(rates, (), tiny=not wants_gpu()) | {"rows": rows})
    for row in measure(sizes, rates):
        rows.append(asdict(row))
        report.save()


def sampling(seconds: float, report: Report) -> None:
    """Our sampling kernel beside XLA's path: the same tokens, and seconds a call.

    It takes as long as compiling does, not `seconds`. A kind of row that is wrong gets no time.
    """
    from jaxserve.bench import sampling_kernel

    check_jax()
    sizes = sampling_kernel.FULL if wants_gpu() else sampling_kernel.TINY
    first, *others = sizes.vocabularies
    wrong: list[str] = []
    timed: list[Numbers] = []
    report.save(
        count=sizes.rows,
        vocabulary=first,
        checked=0,
        of=len(sizes.vocabularies) * len(sampling_kernel.KINDS),
        at_boundary=0,
        wrong=wrong,
        rows=timed,
    )

    def check(vocabularies: Iterable[int]) -> list[str]:
        """Returns the kinds that were right."""
        right = []
        for case in sampling_kernel.check(sizes.rows, vocabularies):
            report.numbers["checked"] += 1
            report.numbers["at_boundary"] += case.at_boundary
            wrong.extend(f"{case.vocabulary}, {case.kind}: {line}" for line in case.wrong)
            report.save_now_and_then()
            if not case.wrong:
                right.append(case.kind)
        return right

    kinds = check([first])
    for row in sampling_kernel.measure(sizes.rows, first, kinds, budget_s=sizes.budget_s):
        timed.append(row._asdict())
        report.save()
    check(others)
    report.save()


def libraries(seconds: float, report: Report) -> None:
    """The kernels of torch's libraries on the same shapes, in the peers' Python."""
    python = os.environ.get(PEERS_PYTHON) or sys.executable
    rows: list[Numbers] = []
    report.save(rows=rows)
    if run.missing_modules(python, ["torch"]):
        report.save(note=f"torch is not installed for {python}")
        return
    arguments = [f"--sizes={'full' if wants_gpu() else 'tiny'}"]
    for result in _results(python, "attention_kernels", arguments, report):
        if isinstance(result, KernelResult):
            rows.append(asdict(result))
            report.save()


def _results(
    python: str, module: str, arguments: list[str], report: Report
) -> Iterator[run.Result]:
    """What a peer measures; how it died, if it did, becomes the part's note."""
    try:
        yield from run.run_module(python, module, arguments)
    except run.PeerFailed as error:
        print(error, file=sys.stderr)
        report.save(note=str(error).strip().splitlines()[-1][:200])


class Batch(NamedTuple):
    """Requests that are all alike."""

    shape: str  # of the model
    count: int
    prompt_tokens: int
    output_tokens: int

    def requests(self, vocab_size: int, *, output_tokens: int, seed: int) -> tuple[Request, ...]:
        return equal_requests(
            vocab_size,
            count=self.count,
            prompt_tokens=self.prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
        )


_BATCH: Final = Batch("llama3-8b", 64, 512, 128)
_TINY_BATCH: Final = Batch("tiny", 4, 24, 8)


def batch() -> Batch:
    """What our engine and transformers are compared on."""
    return _BATCH if wants_gpu() else _TINY_BATCH


def transformers(seconds: float, report: Report) -> None:
    """The same batch through transformers' `generate_batch`, in the peers' Python."""
    python = os.environ.get(PEERS_PYTHON) or sys.executable
    runs: list[Numbers] = []
    report.save(runs=runs)
    missing = run.missing_modules(python, ["torch", "transformers"])
    if missing:
        report.save(note=f"{' and '.join(missing)}: not installed for {python}")
        return
    shape, *numbers = batch()
    names = ("requests", "prompt_tokens", "output_tokens")
    arguments = [f"--{name}={value}" for name, value in zip(names, numbers, strict=True)]
    arguments += [f"--shape={shape}", f"--device={'cuda' if wants_gpu() else 'cpu'}"]
    for result in _results(python, "generate_batch", arguments, report):
        if isinstance(result, WorkloadResult):
            runs.append(asdict(result) | {"tokens_per_s": result.tokens_per_s})
            report.save()


# Rows and tokens of context of the slices to time.
_STEPS: Final = ((64, 1024), (256, 1024))
_TINY_STEPS: Final = ((2, 32), (8, 48))
_SLICE_STEPS: Final = 32

SAMPLED: Final = SamplingParams(temperature=0.8, top_p=0.9, ignore_eos=True)
"""How the rows of a sampled slice are drawn. Random weights make flat logits, and so large nuclei:
the slowest rows there are."""


def _settings(rows: int, prompt_tokens: int, num_pages: int) -> Settings:
    """What `jaxserve profile` would make of a deployment of so many rows, prompt tokens per step
    and pages."""
    tiny = not wants_gpu()
    flags = [
        f"--model=random:{'tiny' if tiny else 'llama3-8b'}",
        f"--max_rows={8 if tiny else rows}",
        f"--max_prefill_tokens={128 if tiny else prompt_tokens}",
        f"--page_size={16 if tiny else 64}",
        # Not what is free: programs with another pool would be compiled again.
        f"--num_pages={64 if tiny else num_pages}",
        "--mesh=tp=1",
        "--kernels=auto",
        f"--compilation_cache={os.environ.get(CACHE, '')}",
    ]
    groups = (flag_table.PROFILING, flag_table.MODEL, flag_table.PROGRAMS, flag_table.MEMORY)
    return parse(groups, flags, environment={}, known=set())


class _Deployment(NamedTuple):
    """An engine that is ready to run slices."""

    config: Any  # EngineConfig
    executor: Any
    info: Any  # ModelInfo
    buckets: tuple[Any, ...]


def _deploy(
    settings: Settings, report: Report, *, steps: Sequence[tuple[int, int]] = ()
) -> _Deployment:
    """Build what serving would, with weights drawn on the device. Where `steps` are to be timed,
    with few programs: decoding of the rows of each, and one with prompts, which starts rows."""
    from jaxserve.bench.device_weights import draw_weights
    from jaxserve.config import EngineConfig
    from jaxserve.engine.buckets import Bucket
    from jaxserve.engine.build import TILE, build_jax, serving_buckets
    from jaxserve.models.sources import load_model_config, parse_source

    check_jax()
    config = settings.record(EngineConfig)
    source = parse_source(config.model)
    model = load_model_config(source)
    buckets = serving_buckets(config)
    if steps:
        rows = [rows for rows, _ in steps]
        tiles = config.scheduler.max_prefill_tokens // TILE
        buckets = (*(Bucket(n, 0) for n in rows), Bucket(max(rows[0], batch().count), tiles))
    began_s = time.monotonic()
    executor, info, _ = build_jax(
        config,
        source,
        model,
        report.say,
        buckets=buckets,
        weigh=lambda dtype, mesh: draw_weights(model, dtype=dtype, mesh=mesh),
    )
    report.save(
        model=config.model,
        dtype=info.dtype,
        kernels=info.kernels,
        num_pages=info.num_pages,
        build_s=time.monotonic() - began_s,
    )
    return _Deployment(config, executor, info, buckets)


def _steps() -> tuple[tuple[int, int], ...]:
    return _STEPS if wants_gpu() else _TINY_STEPS


def engine(seconds: float, report: Report) -> None:
    """Decode steps of whole slices, greedy and sampled, with the bytes and products that they take
    at least; then the batch that transformers runs as well.

    The bytes and FLOPs are those of the computed profiles: every weight and every row's keys read
    once. It takes as long as building a deployment does, not `seconds`.
    """
    _run_batches(_deploy_and_time(_steps(), report), report)


def graphs(seconds: float, report: Report) -> None:
    """The decode steps of the smaller slice once more, as XLA compiles it by this process's flags:
    those that bring its loop into a CUDA graph, where `scripts/gpu_check` runs it.

    It takes as long as building a deployment does, not `seconds`.
    """
    report.save(xla_flags=os.environ.get("XLA_FLAGS", ""))
    _deploy_and_time(_steps()[:1], report)


def _deploy_and_time(steps: Sequence[tuple[int, int]], report: Report) -> _Deployment:
    # 256 rows of 1 k tokens and a slice, in 36 GiB.
    deployment = _deploy(_settings(256, 2048, 4608), report, steps=steps)
    timed: list[Numbers] = []
    report.save(steps=timed)
    for step in _time_steps(deployment, steps):
        timed.append(step)
        times = f"{step['step_s'] * 1e3:.2f} ms a step, {step['sampled_step_s'] * 1e3:.2f} sampled"
        report.say(f"{step['rows']} x {step['context']}: {times}")
    return deployment


def _limits(deployment: _Deployment) -> Any:  # measure.Limits
    from jaxserve.engine.build import bench_limits

    config, _, info, buckets = deployment
    limits = bench_limits(config, max_context=info.config.max_context, num_pages=info.num_pages)
    return replace(limits, buckets=buckets)


def _time_steps(deployment: _Deployment, steps: Sequence[tuple[int, int]]) -> Iterator[Numbers]:
    from jaxserve.engine.measure import Point, SliceBench
    from jaxserve.models.profile import ModelShape
    from jaxserve.schedulers.estimators.roofline_time import DEVICES, RooflineTime

    config, executor, info, _ = deployment
    limits = _limits(deployment)
    # Bytes and products are the model's; the data sheet's rates are not read.
    sizes = ModelShape.of(info.config).sizes(info.dtype, config.cache.kv_dtype)
    counts = RooflineTime(sizes=sizes, device=DEVICES["h200"], num_devices=1)
    for rows, context in steps:
        point = Point(_SLICE_STEPS, (context,) * rows)
        step_s, tokens = _time_slice(SliceBench(executor, limits), point)
        sampled_s, sampled = _time_slice(SliceBench(executor, limits, params=SAMPLED), point)
        attended = rows * (context + _SLICE_STEPS / 2)
        yield {
            "rows": rows,
            "context": context,
            "step_s": step_s,
            "sampled_step_s": sampled_s,
            "tokens": f"{tokens} {sampled}",
            "bytes": counts.step_bytes(rows, rows, attended),
            "flops": counts.step_flops(rows, rows, attended),
        }


def _time_slice(bench: Any, point: Any) -> tuple[float, str]:  # SliceBench, Point
    """Seconds of a step, and a word for each row that stands for its tokens."""
    bench.run(point)
    times = [bench.run(point)[1] / point.steps for _ in range(5)]
    words = [f"{zlib.crc32(str(made).encode()):08x}" for made in bench.made]
    return statistics.median(times), " ".join(words)


def _run_batches(deployment: _Deployment, report: Report) -> None:
    """The batch twice, after a short one that warms up."""
    from jaxserve.bench.offline import run_batch
    from jaxserve.engine.measure_dispatch import measure_dispatch

    wanted, vocab_size = batch(), deployment.info.config.vocab_size
    runs: list[Numbers] = []
    report.save(batch=wanted._asdict(), runs=runs)
    dispatch_s = measure_dispatch(deployment.executor, _limits(deployment))
    report.save(dispatch_s=dispatch_s)
    serve: Callable[..., WorkloadResult] = partial(
        run_batch, *deployment[:3], dispatch_s=dispatch_s
    )
    serve(wanted.requests(vocab_size, output_tokens=8, seed=0))
    for seed in (1, 2):
        requests = wanted.requests(vocab_size, output_tokens=wanted.output_tokens, seed=seed)
        result = serve(requests)
        runs.append(asdict(result) | {"tokens_per_s": result.tokens_per_s})
        report.say(f"{wanted.count} requests: {result.tokens_per_s:.0f} tokens/s")


_POINTS_EACH: Final = 6


def profile(seconds: float, report: Report) -> None:
    """What `jaxserve profile` measures, of a smaller deployment: it runs every program many times.

    Fewer points than there, and random weights from the device.
    """
    from jaxserve.engine.measured_profile import measure_profile

    config, executor, info, buckets = _deploy(_settings(16, 512, 4096), report)
    done = measure_profile(
        config,
        executor,
        info,
        buckets=buckets,
        seconds=seconds,
        progress=report.say,
        points_each=_POINTS_EACH,
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "profile.json"
        done.profile.save(path)
        report.save(profile=json.loads(path.read_text()), num_slices=done.num_slices)
