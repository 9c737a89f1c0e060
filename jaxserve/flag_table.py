"""The table of all command-line flags: name, the field it sets, one line of help. Parses nothing.

Type and default are the field's own, so that a default is written once, in the configuration
records, and every flag has a reader by construction. A command's flags are a tuple of groups.
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxserve.config import EXECUTORS, KV_DTYPES, PREFIX_SCOPES, EngineConfig, PresetConfig
from jaxserve.report.config import OutputConfig, ReportConfig
from jaxserve.request import SamplingParams
from jaxserve.schedulers.catalog import ROUTINGS, SLICINGS, VICTIMS
from jaxserve.schedulers.estimators.roofline_time import DEVICES
from jaxserve.schedulers.pool.catalog import POOLS
from jaxserve.schedulers.presets import PRESETS, fill_fleet_preset, fill_preset
from jaxserve.server_config import (
    AGAINST,
    BENCH_APIS,
    CLIENT_METRICS,
    CONVERT_DTYPES,
    LOG_LEVELS,
    SAMPLING_DEFAULTS,
    BenchConfig,
    CompileConfig,
    ConvertConfig,
    GenerateConfig,
    KeyConfig,
    LogConfig,
    ProfileConfig,
    ServerConfig,
)
from jaxserve.sim_config import SimConfig
from jaxserve.workload.config import TOO_LONG, WorkloadConfig
from jaxserve.workload.feed import LOOPS
from jaxserve.workload.generators import GENERATORS
from jaxserve.workload.readers import CLIENT_FROM, FORMATS

Fill = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
"""fill(a value, values that were chosen) gives the values it stands for, by flag name."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. `path` is the field of `record` it sets, dotted where records nest.

    `make_default` is for a default that depends on the user, which a record cannot know. With
    `fill` the flag stands for values of others: fill(its value, values that were chosen) gives
    them by flag name, and raises ValueError for a value that does not exist.
    """

    name: str
    record: type
    path: str
    help: str
    choices: tuple[str, ...] = ()
    make_default: Callable[[], Any] | None = None
    fill: Fill | None = None

    @property
    def kind(self) -> Any:
        """The field's annotation, for example `int` or `int | None`."""
        owner: Any = self.record
        for part in self.path.split("."):
            owner = typing.get_type_hints(owner)[part]
        return owner

    @property
    def default(self) -> Any:
        if self.make_default is not None:
            return self.make_default()
        owner: Any = self.record
        for part in self.path.split("."):
            field = next(field for field in dataclasses.fields(owner) if field.name == part)
            owner = field.default
        return owner


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    flags: tuple[Flag, ...]


def user_cache_dir() -> str:
    """$XDG_CACHE_HOME/jaxserve, or ~/.cache/jaxserve."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(home) / "jaxserve")


def _engine(name: str, path: str, text: str, choices: tuple[str, ...] = ()) -> Flag:
    return Flag(name, EngineConfig, path, text, choices)


def _order(name: str, text: str, choices: tuple[str, ...] = ()) -> Flag:
    return Flag(name, EngineConfig, f"scheduler.{name}", text, choices)


def _sampling(name: str, text: str) -> Flag:
    return Flag(name, SamplingParams, name, text)


def _bench(name: str, text: str, choices: tuple[str, ...] = ()) -> Flag:
    return Flag(name, BenchConfig, name, text, choices)


def _workload(name: str, path: str, text: str, choices: tuple[str, ...] = ()) -> Flag:
    return Flag(name, WorkloadConfig, path, text, choices)


def _sim(name: str, text: str, choices: tuple[str, ...] = ()) -> Flag:
    return Flag(name, SimConfig, name, text, choices)


def _output(name: str, text: str) -> Flag:
    return Flag(name, OutputConfig, name, text)


MODEL: Final = Group(
    "model",
    (
        _engine("model", "model", "demo, random:<shape>, orbax:<directory> or hf:<directory>"),
        _engine("dtype", "dtype", "of weights and activations: auto, float32 or bfloat16"),
        _engine("mesh", "mesh", "tensor parallelism: tp=<devices>, or auto (one per CPU core)"),
        _engine(
            "kernels",
            "kernels",
            "auto (by device), pallas, pallas_gpu, pallas_tpu, cpu, xla, reference",
        ),
        _engine("executor", "executor", "what runs a slice", EXECUTORS),
        _engine(
            "profile", "profile", "serving-time profile, by name or file (for --executor=paced)"
        ),
        Flag(
            "compilation_cache",
            EngineConfig,
            "compilation_cache",
            "compiled programs, kept for the next start; empty: not kept",
            make_default=user_cache_dir,
        ),
    ),
)
BASE_SEED: Final = Group(
    "randomness", (_engine("seed", "seed", "base of every request's random numbers"),)
)
MEMORY: Final = Group(
    "memory",
    (
        _engine("page_size", "cache.page_size", "tokens a KV page holds"),
        _engine(
            "kv_dtype", "cache.kv_dtype", "of stored keys and values; auto: --dtype", KV_DTYPES
        ),
        _engine("num_pages", "cache.num_pages", "KV pages; unset: as memory allows"),
        _engine("kv_memory_fraction", "cache.memory_fraction", "of free memory, for KV pages"),
        _engine("prefix_cache", "cache.prefix_cache", "keep finished prompts' pages for reuse"),
        _engine("prefix_scope", "cache.prefix_scope", "who shares prefixes", PREFIX_SCOPES),
    ),
)


def _preset(names: Iterable[str], fill: Fill) -> Flag:
    text = "policies under one name; flags beside it win"
    return Flag("preset", PresetConfig, "preset", text, tuple(names), fill=fill)


_POLICIES: Final = (
    _order("order", "who is next; `jaxserve policies` lists the orders"),
    _order("order_options", "parameter=value of the order; repeatable"),
    _order("admission", "who fits; `jaxserve policies` lists the rules"),
    _order("admission_options", "parameter=value of the admission rule; repeatable"),
    _order("slicing", "how long a slice runs", tuple(SLICINGS)),
    _order("slicing_options", "parameter=value of the slicing; repeatable"),
    _order("victim", "who gives way when pages run short", tuple(VICTIMS)),
    _order("slice_steps", "steps of a fixed slice, most steps of an adaptive one"),
    _order("max_rows", "most sequences that run at once"),
    _order("max_prefill_tokens", "most prompt tokens a slice takes in"),
    _order("max_gap_ms", "most time between a stream's messages; 0: unbounded"),
    _order("watermark_pages", "pages that admission leaves free"),
    _order("max_waiting", "most requests in the queue"),
    _order("max_waiting_tokens", "most prompt tokens in the queue"),
    _order("queue_timeout_s", "longest wait in the queue; 0: unbounded"),
    _order("overlap", "dispatch the next slice before the last is read"),
)
SCHEDULING: Final = Group(
    "scheduling",
    (
        _preset([name for name in PRESETS if not PRESETS[name].only_fleet], fill_preset),
        *_POLICIES,
    ),
)
FLEET_SCHEDULING: Final = Group("scheduling", (_preset(PRESETS, fill_fleet_preset), *_POLICIES))
SIMULATED_MEMORY: Final = Group(
    "memory",
    tuple(flag for flag in MEMORY.flags if flag.name not in ("kv_memory_fraction", "kv_dtype")),
)
SIMULATION: Final = Group(
    "simulated fleet",
    (
        _sim("profile", "serving-time profile of the devices: a name or a file"),
        _sim("noise", "scatter of slice times, as a share of the profile's; 0: none"),
        _sim("max_context", "longest prompt and output; 0: as the profile's model"),
        _sim("replicas", "how many"),
        _sim("routing", "which replica gets a request", tuple(ROUTINGS)),
        _sim("routing_options", "parameter=value of it; repeatable"),
        _sim("pool", "planner over all replicas instead of routing", ("", *POOLS)),
        _sim("pool_options", "parameter=value of it; repeatable"),
        _sim("blind", "run policies whose prefixes or clients the workload lacks"),
        _sim("fail", "replica:seconds[:seconds it is back]; repeatable"),
        _sim("report_s", "time between load reports of a replica"),
        _sim("cache_event_s", "how late the router hears of a cache's changes"),
        _sim("cache_event_loss", "share of them it never hears of"),
        _sim("submit_s", "way of a request from client to replica"),
        _sim("deliver_s", "way of its tokens back"),
        _sim("seed", "of noise and losses"),
    ),
)
SERVER: Final = Group(
    "server",
    (
        Flag("host", ServerConfig, "host", "address to bind; without API keys, of this machine"),
        Flag("port", ServerConfig, "port", "TCP port of gRPC; 0: any free one"),
        Flag("http_port", ServerConfig, "http_port", "of HTTP; unset: gRPC's + 1; -1: no HTTP"),
        Flag("api_keys", ServerConfig, "api_keys", "file of keys and clients; empty: no keys"),
        Flag("chat_template", ServerConfig, "chat_template", "Jinja file; empty: the model's own"),
        Flag(
            "sampling_defaults",
            ServerConfig,
            "sampling_defaults",
            "what absent sampling fields mean: the model's own defaults, or none",
            SAMPLING_DEFAULTS,
        ),
        Flag(
            "client_metrics",
            ServerConfig,
            "client_metrics",
            "whether /metrics names clients; auto: unless API keys are in use",
            CLIENT_METRICS,
        ),
        Flag("drain_s", ServerConfig, "drain_s", "time to finish after the first signal"),
        Flag("max_message_mb", ServerConfig, "max_message_mb", "largest message taken or sent"),
    ),
)
LOG_LEVEL: Final = Flag("log_level", LogConfig, "log_level", "least level shown", LOG_LEVELS)
LOGGING: Final = Group(
    "logging",
    (
        LOG_LEVEL,
        Flag("request_log", LogConfig, "request_log", "one JSON line per request; empty: none"),
        _engine("event_log", "event_log", "the engine's events, for replay; empty: none"),
    ),
)
PROMPT: Final = Group(
    "prompt",
    (
        Flag("prompt", GenerateConfig, "prompt", 'text to continue; "-" reads stdin'),
        Flag("token_ids", GenerateConfig, "token_ids", "the prompt as ids, such as 5,17,3"),
        Flag("server", GenerateConfig, "server", "host:port; empty: run the engine right here"),
        Flag(
            "api_key", GenerateConfig, "api_key", "key for the server; better in JAXSERVE_API_KEY"
        ),
        Flag("timeout_s", GenerateConfig, "timeout_s", "longest time for the whole answer"),
        LOG_LEVEL,
    ),
)
KEY: Final = Group(
    "key",
    (
        Flag("client", KeyConfig, "client", "the party that the key stands for"),
        Flag("weight", KeyConfig, "weight", "its share beside other clients'"),
        Flag("priority", KeyConfig, "priority", "least,most its requests may ask for; empty: any"),
    ),
)
CONVERSION: Final = Group(
    "conversion",
    (
        Flag("model", ConvertConfig, "model", "hf:<directory>"),
        Flag("output", ConvertConfig, "output", "model directory to write"),
        Flag("dtype", ConvertConfig, "dtype", "to store; auto: as it is", CONVERT_DTYPES),
        LOG_LEVEL,
    ),
)
OUTPUT: Final = Group(
    "output",
    (
        _output("json", "report in JSON, for `jaxserve report`; empty: none"),
        _output("json_rows", "with a row for each request"),
        _output("html", "report as one HTML file with plots; empty: none"),
        _output("csv", "a line for each request; empty: none"),
        _output("csv_clients", "a line for each client; empty: none"),
        _output("chrome_trace", "slices, for Perfetto or chrome://tracing; empty: none"),
        _output("slo_ttft_ms", "goodput: longest TTFT; unset: any"),
        _output("slo_tpot_ms", "goodput: longest TPOT; unset: any"),
        _output("slo_e2e_s", "goodput: longest E2E; unset: any"),
        _output("warmup_s", "left out at the begin; unset: a tenth of the sending time"),
        _output("cooldown_s", "left out at the end; unset: a tenth of the sending time"),
        _output("w_in", "price of a prompt token in the report's service"),
        _output("w_out", "price of an output token in the report's service"),
    ),
)
REPORT: Final = Group(
    "report",
    (
        Flag("compare", ReportConfig, "compare", "a run's JSON report; repeatable, 1 to 8"),
        Flag(
            "different_workloads",
            ReportConfig,
            "different_workloads",
            "compare runs of different workloads too",
        ),
        Flag("html", ReportConfig, "html", "page to write; empty: none"),
    ),
)
PROFILING: Final = Group(
    "profile",
    (
        Flag("output", ProfileConfig, "output", "JSON file to write"),
        Flag("minutes", ProfileConfig, "minutes", "about how long to measure"),
        Flag("live_log", ProfileConfig, "live_log", "a server's --event_log: its host's cost"),
        Flag("computed", ProfileConfig, "computed", "compute from a data sheet, measure nothing"),
        Flag("device", ProfileConfig, "device", "whose data sheet: " + ", ".join(DEVICES)),
        LOG_LEVEL,
    ),
)
PROGRAMS: Final = Group(
    "programs",
    tuple(
        flag
        for flag in SCHEDULING.flags
        if flag.name in ("slice_steps", "max_rows", "max_prefill_tokens")
    ),
)
COMPILATION: Final = Group(
    "compilation",
    (
        Flag(
            "topology", CompileConfig, "topology", "chips to compile for, such as v5e:2x2 or h200:1"
        ),
        Flag("json", CompileConfig, "json", "report in JSON; empty: none"),
    ),
)
COMPILED_MODEL: Final = Group(
    "model",
    tuple(flag for flag in MODEL.flags if flag.name in ("model", "dtype", "mesh", "kernels")),
)
COMPILED_MEMORY: Final = Group(
    "memory",
    tuple(flag for flag in MEMORY.flags if flag.name not in ("prefix_cache", "prefix_scope")),
)
SAMPLING: Final = Group(
    "sampling",
    (
        _sampling("max_tokens", "most tokens to make; unset: up to the model's context"),
        _sampling("min_tokens", "tokens before anything may stop the text"),
        _sampling("temperature", "0: always the likeliest token"),
        _sampling("top_k", "draw among the k likeliest tokens; 0: off"),
        _sampling("top_p", "draw among the likeliest tokens of this mass; 1: off"),
        _sampling("min_p", "least probability beside the likeliest token's; 0: off"),
        _sampling("repetition_penalty", "divides logits of tokens seen; 1: off"),
        _sampling("presence_penalty", "taken from logits of tokens made; 0: off"),
        _sampling("frequency_penalty", "taken per occurrence; 0: off"),
        _sampling("seed", "of this text; unset: drawn"),
        _sampling("stop", "string that ends the text; repeatable"),
        _sampling("include_stop", "print the stop string as well"),
        _sampling("ignore_eos", "go on after the model's end of sequence"),
    ),
)
BENCH: Final = Group(
    "load client",
    (
        _bench("server", "host:port, HTTP also a URL; empty: 127.0.0.1:8470, HTTP 8471"),
        _bench("api", "what the server speaks", BENCH_APIS),
        _bench("served_model", "name to ask for; empty: the server's first"),
        _bench("api_key", "key for the server; better in JAXSERVE_API_KEY"),
        _bench("client_keys", "file of lines client=key; empty: --api_key for all"),
        _bench("vocab_size", "token ids to draw from; unset: as the server says"),
        _bench("max_context", "longest prompt and answer; unset: as the server says"),
        _bench("connections", "HTTP/2 connections of gRPC, used by turns"),
        _bench("temperature", "0: always the likeliest token"),
        _bench("ignore_eos", "ask for answers of full length; false: a server refuses it"),
        _bench("send_s", "stop sending after so many seconds; 0: at the workload's end"),
        _bench("grace_s", "longest wait for answers after the last request was sent"),
        _bench("repeat", "runs with seeds of their own; shows means and intervals"),
        _bench("against", "also simulate the workload, and show the errors", AGAINST[1:]),
    ),
)
AGAINST_SIMULATION: Final = Group(
    "against=simulate",
    tuple(
        flag
        for flag in SIMULATION.flags
        if flag.name in ("profile", "noise", "blind", "submit_s", "deliver_s")
    ),
)
SWEEP: Final = Group(
    "rate sweep",
    (
        _bench("sweep", "try rates until the server cannot keep up; shows the knee"),
        _bench("sweep_from", "first rate, requests/s; then doubled"),
        _bench("sweep_to", "highest rate, requests/s"),
        _bench("sweep_s", "steady window of a rate, seconds"),
        _bench("sweep_warm_up_s", "seconds before it that do not count"),
        _bench("sweep_share", "share of requests that must meet the limits, if there are any"),
        _bench("sweep_tolerance", "how closely the knee is found, as a share of it"),
    ),
)
WORKLOAD: Final = Group(
    "workload",
    (
        _workload("trace", "trace", "trace file, plain or gzip; empty: a generated workload"),
        _workload("trace_format", "trace_format", "of the file", ("auto", *FORMATS)),
        _workload("trace_from_s", "trace_from_s", "leave out what arrives before"),
        _workload("trace_until_s", "trace_until_s", "leave out what arrives later; unset: nothing"),
        _workload("client_from", "client_from", "what a trace's clients are", CLIENT_FROM),
        _workload("jitter_s", "jitter_s", "delay arrivals at random by up to so much"),
        _workload("workload", "workload", "generator; empty: fair_mix", tuple(GENERATORS)),
        _workload("workload_options", "workload_options", "parameter=value of it; repeatable"),
        _workload("workload_seed", "seed", "of generated workloads and of jitter"),
        _workload("num_requests", "num_requests", "how many; unset: a whole trace, or 1000"),
        _workload("rate", "rate", "requests per second on average; unset: as they come"),
        _workload("time_scale", "time_scale", "multiplies arrivals and think times"),
        _workload("length_scale", "length_scale", "multiplies prompts and outputs"),
        _workload("workload_max_tokens", "max_tokens", "limit requests state; 0: their output"),
        _workload("too_long", "too_long", "of requests beyond the model's context", TOO_LONG),
        _workload("loop", "loop", "when to send: by arrival, or as earlier ones end", LOOPS),
        _workload("concurrency", "concurrency", "requests under way with --loop=closed"),
        _workload("per_client", "per_client", "--concurrency counts for each client"),
    ),
)
