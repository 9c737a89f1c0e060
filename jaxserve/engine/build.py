"""From a configuration to an engine that is ready to serve."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve.clock import MonotonicClock
from jaxserve.config import EngineConfig
from jaxserve.engine.batch import BatchShape
from jaxserve.engine.buckets import Bucket, Buckets, make_buckets
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.driver import EngineDriver, OnFailure, OnReport
from jaxserve.engine.event_log import EventLog
from jaxserve.engine.executor import Executor
from jaxserve.engine.measure import Limits as BenchLimits
from jaxserve.engine.measure_dispatch import measure_dispatch, predicted_dispatch
from jaxserve.engine.scripted import Pace, ScriptedExecutor
from jaxserve.engine.statistics import Compiles
from jaxserve.errors import ConfigError
from jaxserve.models.byte_progress import byte_progress
from jaxserve.models.config import ModelConfig
from jaxserve.models.info import ModelInfo
from jaxserve.models.profile import find_profile
from jaxserve.models.sources import ModelSource, load_model_config, load_weights, parse_source
from jaxserve.models.text_files import check_vocabulary, tokenizer_file
from jaxserve.request import Limits
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.serving_time import UNMEASURED_S

TILE = 32
"""Prompt tokens per tile: chunks are rounded up to it."""


def build_engine(
    config: EngineConfig, *, on_report: OnReport, on_failure: OnFailure, progress
) -> EngineDriver:
    """Load the model, size the pool, compile every program; returns a driver that is not started.

    `progress` is called with lines for people. Raises ConfigError for what a user can mend.
    """
    source = parse_source(config.model)
    model = load_model_config(source)
    tokenizer = tokenizer_file(source)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.vocab_size)
    if config.executor == "jax":
        executor, info, compiles = build_jax(config, source, model, progress)
        dispatch_s = UNMEASURED_S
        if config.scheduler.weighs_dispatch:
            limits = bench_limits(config, max_context=model.max_context, num_pages=info.num_pages)
            dispatch_s = measure_dispatch(executor, limits)
            progress(f"a slice takes {1e3 * dispatch_s:.2f} ms beyond its steps")
    else:
        executor, info, dispatch_s = _build_scripted(config, model)
        compiles = Compiles
    core = EngineCore(core_config(config, model, info.num_pages, dispatch_s), compiles=compiles)
    tokens = info.num_pages * info.page_size
    progress(f"KV pool: {info.num_pages} pages of {info.page_size} tokens, {tokens} tokens")
    log = EventLog(config.event_log, core.config) if config.event_log else None
    return EngineDriver(
        core,
        executor,
        MonotonicClock(),
        info=info,
        on_report=on_report,
        on_failure=on_failure,
        log=log,
    )


def core_config(
    config: EngineConfig,
    model: ModelConfig,
    num_pages: int,
    dispatch_s: float = UNMEASURED_S,
) -> CoreConfig:
    """The core's part of a configuration."""
    return CoreConfig(
        limits=_limits(config, model),
        model_key=model.name,
        num_pages=num_pages,
        page_size=config.cache.page_size,
        prefix_cache=config.cache.prefix_cache,
        tile=TILE,
        scheduler=config.scheduler,
        dispatch_s=dispatch_s,
    )


def _limits(config: EngineConfig, model: ModelConfig) -> Limits:
    return Limits(
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        max_samples=config.scheduler.max_rows,
    )


def bench_limits(config: EngineConfig, *, max_context: int, num_pages: int) -> BenchLimits:
    """What slices of a deployment may be measured with."""
    return BenchLimits(
        buckets=serving_buckets(config),
        tile=TILE,
        max_rows=config.scheduler.max_rows,
        max_steps=config.scheduler.make_slicing(max_context=max_context).max_steps,
        max_context=max_context,
        page_size=config.cache.page_size,
        num_pages=num_pages,
    )


def _build_scripted(config: EngineConfig, model: ModelConfig) -> tuple[Executor, ModelInfo, float]:
    pace = _pace(config, model) if config.executor == "paced" else None
    executor = ScriptedExecutor(
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        pace=pace,
    )
    num_pages = config.cache.num_pages or _pages_rows_can_use(config, model)
    info = ModelInfo(
        name=model.name,
        source=config.model,
        config=model,
        dtype="none",
        num_pages=num_pages,
        page_size=config.cache.page_size,
        programs=0,
        kernels={},
        platform=config.executor,
        device_kind="scripted",
        num_devices=0,
    )
    dispatch_s = UNMEASURED_S
    if pace is not None and config.scheduler.weighs_dispatch:
        limits = bench_limits(config, max_context=model.max_context, num_pages=num_pages)
        dispatch_s = predicted_dispatch(pace, limits, vocab_size=model.vocab_size)
    return executor, info, dispatch_s


def _pace(config: EngineConfig, model: ModelConfig) -> Pace:
    if not config.profile:
        raise ConfigError("profile: --executor=paced needs --profile=<name or file>")
    profile = find_profile(config.profile)
    profile.check_shape(model)
    return Pace(profile.time, Buckets(serving_buckets(config), tile=TILE))


def serving_buckets(config: EngineConfig) -> tuple[Bucket, ...]:
    """The programs that serving compiles."""
    max_tiles = -(-config.scheduler.max_prefill_tokens // TILE)
    return make_buckets(config.scheduler.max_rows, max_tiles)


def serving_shape(config: EngineConfig, model: ModelConfig) -> BatchShape:
    """The sizes that the programs of a deployment share."""
    return BatchShape(
        tile=TILE,
        table_pages=-(-model.max_context // config.cache.page_size),
        step_buffer=config.scheduler.make_slicing(max_context=model.max_context).max_steps,
        max_rows=config.scheduler.max_rows,
    )


def build_jax(
    config: EngineConfig,
    source: ModelSource,
    model: ModelConfig,
    progress: Callable[[str], None],
    *,
    buckets: tuple[Bucket, ...] | None = None,
    weigh: Callable[[str, Any], Any] | None = None,
) -> tuple[Executor, ModelInfo, Callable[[], Compiles]]:
    """An executor with its programs compiled, what it runs, and a count of later compilations.

    Benchmarks choose fewer programs (`buckets`), and weights that take no time to read: `weigh`
    makes them of a type and a mesh.
    """
    import jax

    from jaxserve.engine.compile_count import CompileCount
    from jaxserve.engine.devices import open_mesh
    from jaxserve.engine.jax_executor import JaxExecutor
    from jaxserve.engine.kernel_choice import choose_kernels
    from jaxserve.models.partition import spread_config

    count = CompileCount()
    mesh = open_mesh(config.mesh, model)
    device = jax.devices()[0]
    dtype = serving_dtype(config, device.platform)
    held = spread_config(model, mesh.size)
    kernels = choose_kernels(config, held, dtype=dtype, device=device)
    if config.compilation_cache:
        _use_compilation_cache(config.compilation_cache)
    if weigh is not None:
        weights = weigh(dtype, mesh)
    else:
        report = byte_progress(progress)
        weights = load_weights(
            source, model, dtype=dtype, seed=config.seed, mesh=mesh, progress=report
        )
    progress(
        f"model {model.name}: {model.num_parameters / 1e6:.1f} M parameters in {dtype} on"
        f" {mesh.size} x {device.device_kind}"
    )
    page_size = config.cache.page_size
    token_bytes = kernels.bytes_per_token(held, page_size)
    num_pages = serving_pages(config, held, token_bytes, lambda: _free_bytes(mesh))
    kernels.check_pool(held, num_pages, page_size, num_devices=mesh.size)
    progress(f"kernels: {kernels}")
    executor = JaxExecutor(
        model,
        weights,
        mesh=mesh,
        shape=serving_shape(config, model),
        buckets=serving_buckets(config) if buckets is None else buckets,
        num_pages=num_pages,
        page_size=page_size,
        kernels=kernels.attention,
        dtype=dtype,
        kv_dtype=kernels.kv_dtype,
    )
    executor.compile_all(progress, threads=max(2, len(os.sched_getaffinity(0))))
    info = ModelInfo(
        name=model.name,
        source=config.model,
        config=model,
        dtype=dtype,
        num_pages=num_pages,
        page_size=page_size,
        programs=executor.num_programs,
        kernels=kernels.names(),
        platform=device.platform,
        device_kind=device.device_kind,
        num_devices=mesh.size,
    )
    count.start_serving()
    return executor, info, count.compiles


def serving_dtype(config: EngineConfig, platform: str) -> str:
    """Of weights and activations, `auto` decided."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else "bfloat16"


def _use_compilation_cache(directory: str) -> None:
    import jax

    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"compilation_cache: {directory!r}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _pages_rows_can_use(config: EngineConfig, model: ModelConfig) -> int:
    """Pages of `max_rows` rows of full context: more would hold nothing but cached prefixes."""
    return config.scheduler.max_rows * -(-model.max_context // config.cache.page_size)


def serving_pages(
    config: EngineConfig,
    held: ModelConfig,
    bytes_per_token: int,
    free_bytes_of: Callable[[], int],
) -> int:
    """As many pages as `memory_fraction` of free memory holds, and rows can use.

    `held` is the model as it is spread over its devices, whose free bytes are asked for unless the
    pages were chosen. Raises ConfigError when fewer than two fit.
    """
    if config.cache.num_pages is not None:
        return config.cache.num_pages
    free_bytes = free_bytes_of()
    fit = KvMemory.within(
        free_bytes,
        config.cache.memory_fraction,
        page_size=config.cache.page_size,
        bytes_per_token=bytes_per_token,
    )
    if fit.num_pages < 2:
        raise ConfigError(
            f"kv_memory_fraction: {config.cache.memory_fraction} of {free_bytes / 2**20:.0f} MiB"
            f" free holds {fit.num_pages} pages of {fit.page_bytes / 2**20:.2f} MiB, at least 2 are"
            " needed; lower --page_size or use a smaller model or --kv_dtype=bfloat16"
        )
    return min(fit.num_pages, _pages_rows_can_use(config, held))


def _free_bytes(mesh) -> int:
    """Free on all devices of the mesh, each of which holds an equal part of every page."""
    statistics = [device.memory_stats() for device in mesh.devices.flat]
    if all(statistics):
        return len(statistics) * min(s["bytes_limit"] - s["bytes_in_use"] for s in statistics)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
