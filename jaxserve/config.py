"""Configuration as frozen records, checked on construction. Knows no flags: flags.py does.

Simulator and server share these records and so their defaults; every report prints them.
"""

import math
import re
import typing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jaxserve.errors import ConfigError
from jaxserve.schedulers.catalog import (
    ORDERS,
    find_order,
    find_slicing,
    make_admission,
    make_order,
    make_slicing,
    victim_key,
)
from jaxserve.schedulers.estimators.serving_time import UNMEASURED_S
from jaxserve.schedulers.presets import find_preset
from jaxserve.schedulers.slicing import SliceBounds, Slicing

PREFIX_SCOPES = ("auto", "client", "group", "all")
KV_DTYPES = ("auto", "float32", "bfloat16", "int8", "float8_e4m3fn")
EXECUTORS = ("jax", "paced", "mock")


def _require(condition: bool, field: str, got: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}; allowed: {allowed}")


_Record = TypeVar("_Record")


def record_from_dict(kind: type[_Record], fields: dict[str, Any]) -> _Record:
    """The inverse of `dataclasses.asdict`, by way of JSON, for records that nest."""
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = record_from_dict(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return kind(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV pool. `num_pages` None: as many as fit into `memory_fraction` of free memory.

    Long pages are read faster (on CPU, 64 tokens in 4/5 of the time of 32), short ones share
    shorter prefixes. `prefix_scope` auto is `client` where API keys are in use, else `all`.
    `kv_dtype` is how keys and values are stored, auto being the model's own type.
    """

    page_size: int = 64
    kv_dtype: str = "auto"
    num_pages: int | None = None
    memory_fraction: float = 0.5
    prefix_cache: bool = True
    prefix_scope: str = "auto"

    def __post_init__(self) -> None:
        size = self.page_size
        _require(8 <= size <= 256 and size & (size - 1) == 0, "page_size", size, "8, 16 ... 256")
        _require(self.kv_dtype in KV_DTYPES, "kv_dtype", self.kv_dtype, ", ".join(KV_DTYPES))
        if self.num_pages is not None:
            _require(self.num_pages >= 2, "num_pages", self.num_pages, "at least 2")
        fraction = self.memory_fraction
        _require(0 < fraction <= 0.95, "kv_memory_fraction", fraction, "a number in (0, 0.95]")
        scope = self.prefix_scope
        _require(scope in PREFIX_SCOPES, "prefix_scope", scope, ", ".join(PREFIX_SCOPES))

    def resolved(self, *, has_keys: bool) -> "CacheConfig":
        """With `prefix_scope` auto decided: keys tell clients apart that may not trust another."""
        if self.prefix_scope != "auto":
            return self
        return replace(self, prefix_scope="client" if has_keys else "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Order, admission, slicing and victims of one replica, and the bounds of its queue.

    `..._options` set a policy's parameters, such as "quantum=9000"; `jaxserve policies` lists them.
    `max_rows` is the most sequences that run at once, `max_prefill_tokens` the most prompt tokens
    a tick may hold beside its decode rows. `slice_steps` is S of `fixed` and the most steps of
    `adaptive` (tokens per row and slice). `max_gap_ms` bounds the delivery gap of running streams
    (0: unbounded). `queue_timeout_s` 0 means requests wait without limit.
    """

    order: str = "fcfs"
    order_options: tuple[str, ...] = ()
    admission: str = "slice_lease"
    admission_options: tuple[str, ...] = ()
    slicing: str = "adaptive"
    slicing_options: tuple[str, ...] = ()
    victim: str = "order"
    slice_steps: int = 64
    max_rows: int = 64
    max_prefill_tokens: int = 512
    max_gap_ms: float = 0.0
    watermark_pages: int = 0
    max_waiting: int = 4096
    max_waiting_tokens: int = 4_000_000
    queue_timeout_s: float = 600.0
    overlap: bool = True

    def __post_init__(self) -> None:
        for field, least, most in (
            ("slice_steps", 1, 1024),
            ("max_rows", 1, 4096),
            ("max_prefill_tokens", 16, 65536),
            ("watermark_pages", 0, 2**31),
            ("max_waiting", 1, 10**7),
            ("max_waiting_tokens", 1, 10**12),
        ):
            value = getattr(self, field)
            _require(least <= value <= most, field, value, f"{least} to {most}")
        for field in ("max_gap_ms", "queue_timeout_s"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value >= 0, field, value, "0 (off) or positive")
        try:
            make_order(self.order, self.order_options, page_size=1)
            make_admission(self.admission, self.admission_options)
            self.make_slicing(max_context=1)
            victim_key(self.victim)
            bounds_gap = find_slicing(self.slicing).bounds_gap
        except ValueError as error:
            raise ConfigError(str(error)) from None
        kept = self.max_gap_ms == 0 or bounds_gap
        allowed = f"0, for --slicing={self.slicing} bounds no gap; --slicing=adaptive does"
        _require(kept, "max_gap_ms", self.max_gap_ms, allowed)

    @property
    def weighs_dispatch(self) -> bool:
        """Whether the slicing plans by what a dispatch takes."""
        return find_slicing(self.slicing).weighs_dispatch

    def make_slicing(self, *, max_context: int, dispatch_s: float = UNMEASURED_S) -> Slicing:
        """The slicing, for contexts of so many tokens and a device that takes so long to begin."""
        bounds = SliceBounds(
            slice_steps=self.slice_steps,
            max_context=max_context,
            max_gap_s=self.max_gap_ms / 1e3,
            overlap=self.overlap,
            dispatch_s=dispatch_s,
        )
        return make_slicing(self.slicing, self.slicing_options, bounds=bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetConfig:
    """The preset that filled in the scheduler's settings nobody chose; the launcher applies it."""

    preset: str = "default"

    def __post_init__(self) -> None:
        try:
            find_preset(self.preset)
        except ValueError as error:
            raise ConfigError(str(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything one engine process needs to start."""

    model: str = "demo"
    executor: str = "jax"
    mesh: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    seed: int = 0
    replica: str = "replica-0"
    profile: str = ""
    event_log: str = ""
    compilation_cache: str = ""
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()

    def __post_init__(self) -> None:
        _require(self.executor in EXECUTORS, "executor", self.executor, ", ".join(EXECUTORS))
        dtypes = ("auto", "float32", "bfloat16")
        _require(self.dtype in dtypes, "dtype", self.dtype, ", ".join(dtypes))
        mesh = re.fullmatch(r"auto|tp=[1-9]\d{0,3}", self.mesh) is not None
        _require(mesh, "mesh", self.mesh, "auto or tp=<number of devices>")
        read = self.mesh == "auto" or self.executor == "jax"
        _require(read, "mesh", self.mesh, "auto unless --executor=jax")
        read = not self.profile or self.executor == "paced"
        _require(read, "profile", self.profile, "unset unless --executor=paced")
        order = self.scheduler.order
        if find_order(order).needs_prefix_cache and not self.cache.prefix_cache:
            blind = [name for name, policy in ORDERS.items() if not policy.needs_prefix_cache]
            raise ConfigError(
                f"order: got {order!r}, which sorts by cached prefixes; allowed with"
                f" --prefix_cache=false: {', '.join(blind)}"
            )
