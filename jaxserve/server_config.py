"""Configuration of the commands beside the engine's, as frozen records. Knows no flags.

`EngineConfig` in `jaxserve/config.py` says what an engine process needs; this says what the front
end and the command line need.
"""

import ipaddress
import math
import re
from dataclasses import dataclass

from jaxserve.errors import ConfigError
from jaxserve.schedulers.estimators.roofline_time import DEVICES

LOG_LEVELS = ("debug", "info", "warning", "error")
SAMPLING_DEFAULTS = ("model", "neutral")
CLIENT_METRICS = ("auto", "on", "off")
CONVERT_DTYPES = ("auto", "bfloat16", "float32")
BENCH_APIS = ("grpc", "openai", "openai-chat")
AGAINST = ("", "simulate")
MOST_REPEATS = 100


def _require(condition: bool, field: str, got: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}; allowed: {allowed}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The front end. A port 0 takes any free one.

    `http_port` None is the one after `port`, or any free one if that is 0; -1 serves no HTTP.
    Without `api_keys`, a file, everybody who reaches the server may use it, so that only this
    machine may reach it. `chat_template` is a file that wins over the model's own.
    `sampling_defaults` says whether requests fall back to the model's own defaults or to neutral
    ones. `client_metrics` auto names clients on the metrics page unless API keys are in use: the
    page needs no key.
    """

    host: str = "127.0.0.1"
    port: int = 8470
    http_port: int | None = None
    api_keys: str = ""
    chat_template: str = ""
    sampling_defaults: str = "model"
    client_metrics: str = "auto"
    drain_s: float = 30.0
    max_message_mb: float = 16.0

    def __post_init__(self) -> None:
        _require(bool(self.host), "host", self.host, "a host name or address; try 127.0.0.1")
        local = bool(self.api_keys) or _is_loopback(self.host)
        _require(local, "host", self.host, "this machine (127.0.0.1, ::1) unless --api_keys is set")
        _require(0 <= self.port <= 65535, "port", self.port, "0 (any free one) to 65535")
        http_port = self.http_port
        good = http_port is None or -1 <= http_port <= 65535
        _require(good, "http_port", http_port, "-1 (no HTTP), 0 (any free one) to 65535, or unset")
        same = http_port == self.port != 0
        _require(not same, "http_port", http_port, "another port than gRPC's")
        good = http_port is not None or self.port < 65535
        _require(good, "port", self.port, "at most 65534, or --http_port of its own")
        defaults = self.sampling_defaults
        _require(
            defaults in SAMPLING_DEFAULTS,
            "sampling_defaults",
            defaults,
            ", ".join(SAMPLING_DEFAULTS),
        )
        shown = self.client_metrics
        _require(shown in CLIENT_METRICS, "client_metrics", shown, ", ".join(CLIENT_METRICS))
        drain_s, mb = self.drain_s, self.max_message_mb
        _require(math.isfinite(drain_s) and drain_s >= 0, "drain_s", drain_s, "0 or more seconds")
        _require(0 < mb <= 1024, "max_message_mb", mb, "a number in (0, 1024]")

    @property
    def names_clients(self) -> bool:
        """Whether the metrics page shows clients by name."""
        if self.client_metrics == "auto":
            return not self.api_keys
        return self.client_metrics == "on"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Where a process tells what it does. `request_log` is a JSONL file; "" writes none."""

    log_level: str = "info"
    request_log: str = ""

    def __post_init__(self) -> None:
        _require(self.log_level in LOG_LEVELS, "log_level", self.log_level, ", ".join(LOG_LEVELS))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """One prompt from the shell: a text ("-" reads stdin) or token ids, separated by commas.

    `server` "" runs the engine in this process; `api_key` is for a server that wants one.
    """

    prompt: str = ""
    token_ids: str = ""
    server: str = ""
    api_key: str = ""
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        both = bool(self.prompt) and bool(self.token_ids)
        neither = not self.prompt and not self.token_ids
        got = f"{self.prompt!r} and token_ids {self.token_ids!r}"
        if both or neither:
            raise ConfigError(f"prompt: got {got}; allowed: exactly one of the two")
        numbers = self.token_ids.split(",") if self.token_ids else []
        wanted = "numbers with commas between, such as 5,17,3"
        _require(all(map(_is_number, numbers)), "token_ids", self.token_ids, wanted)
        timeout_s = self.timeout_s
        wanted = "a positive number of seconds"
        _require(math.isfinite(timeout_s) and timeout_s > 0, "timeout_s", timeout_s, wanted)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.token_ids.split(",")) if self.token_ids else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """A Hugging Face directory (`model`, as `hf:<directory>`) and where its conversion goes.

    `dtype` "auto" is the one that the model is stored in.
    """

    model: str = ""
    output: str = ""
    dtype: str = "auto"

    def __post_init__(self) -> None:
        hf = self.model.startswith("hf:")
        _require(hf, "model", self.model, "hf:<directory>")
        _require(bool(self.output), "output", self.output, "a directory")
        _require(self.dtype in CONVERT_DTYPES, "dtype", self.dtype, ", ".join(CONVERT_DTYPES))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """A serving-time profile: the file to write, and how it is made.

    Measuring takes about `minutes` beside the compilation. `live_log`, the event log of a server
    with the same flags, tells what its host costs. `computed` asks for the roofline of a `device`
    that need not be there.
    """

    output: str = ""
    minutes: float = 5.0
    live_log: str = ""
    computed: bool = False
    device: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.output), "output", self.output, "a file")
        good = math.isfinite(self.minutes) and self.minutes > 0
        _require(good, "minutes", self.minutes, "a positive number")
        both = self.computed == bool(self.device)
        wanted = f"one of {', '.join(DEVICES)} with --computed, unset without"
        _require(both and self.device in ("", *DEVICES), "device", self.device, wanted)
        read = not (self.computed and self.live_log)
        _require(read, "live_log", self.live_log, "unset with --computed")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """A deployment that is compiled where it will not run: for which chips, and a file to write."""

    topology: str = ""
    json: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.topology), "topology", self.topology, "one such as v5e:2x2 or h200:1")


def _is_number(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdigit()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfig:
    """A fresh API key: for whom, with what share, and what priorities its requests may have.

    `priority` is "least,most", or "" for any.
    """

    client: str = ""
    weight: float = 1.0
    priority: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.client.strip()), "client", self.client, "a name")
        good = math.isfinite(self.weight) and self.weight > 0
        _require(good, "weight", self.weight, "a positive number")
        wanted = "two whole numbers, such as 0,10 (smaller is more urgent)"
        good = not self.priority or re.fullmatch(r"-?\d+,-?\d+", self.priority) is not None
        _require(good, "priority", self.priority, wanted)
        _require(self.priorities == sorted(self.priorities), "priority", self.priority, wanted)

    @property
    def priorities(self) -> list[int]:
        """Least and most, or nothing."""
        return [int(part) for part in self.priority.split(",")] if self.priority else []


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """The load client: which server, how it is asked, and which runs are made.

    `server` "" is this machine's default port of the dialect. `served_model` "" is the server's
    only (or first) model. `api_key` stands for every client that the file `client_keys` does not
    name. `vocab_size` and `max_context` None: what the server says. `send_s` 0 sends the whole
    workload. A sweep tries rates from `sweep_from` to `sweep_to` requests/s, each for
    `sweep_warm_up_s` and then `sweep_s` seconds.
    """

    server: str = ""
    api: str = "grpc"
    served_model: str = ""
    api_key: str = ""
    client_keys: str = ""
    vocab_size: int | None = None
    max_context: int | None = None
    connections: int = 4
    temperature: float = 0.0
    ignore_eos: bool = True
    send_s: float = 0.0
    grace_s: float = 60.0
    repeat: int = 1
    against: str = ""
    sweep: bool = False
    sweep_from: float = 1.0
    sweep_to: float = 1000.0
    sweep_s: float = 30.0
    sweep_warm_up_s: float = 5.0
    sweep_share: float = 0.95
    sweep_tolerance: float = 0.05

    def __post_init__(self) -> None:
        _require(self.api in BENCH_APIS, "api", self.api, ", ".join(BENCH_APIS))
        for field in ("vocab_size", "max_context"):
            value = getattr(self, field)
            _require(value is None or value >= 8, field, value, "8 or more, or unset")
        _require(1 <= self.connections <= 256, "connections", self.connections, "1 to 256")
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "0 to 100")
        for field in ("send_s", "grace_s", "sweep_warm_up_s"):
            value = getattr(self, field)
            good = math.isfinite(value) and value >= 0
            _require(good, field, value, "0 or more seconds")
        _require(1 <= self.repeat <= MOST_REPEATS, "repeat", self.repeat, f"1 to {MOST_REPEATS}")
        _require(self.repeat == 1 or not self.sweep, "repeat", self.repeat, "1, with --sweep")
        _require(self.against in AGAINST, "against", self.against, "simulate, or empty")
        alone = self.repeat == 1 and not self.sweep and not self.send_s
        allowed = "empty, with --sweep, --repeat or --send_s"
        _require(alone or not self.against, "against", self.against, allowed)
        for field in ("sweep_from", "sweep_to", "sweep_s", "sweep_tolerance"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value > 0, field, value, "a positive number")
        least = self.sweep_from
        _require(
            least <= self.sweep_to, "sweep_to", self.sweep_to, f"sweep_from ({least:g}) or more"
        )
        _require(0 < self.sweep_share <= 1, "sweep_share", self.sweep_share, "a number in (0, 1]")

    @property
    def address(self) -> str:
        """`server`, or the default of its dialect."""
        return self.server or ("127.0.0.1:8470" if self.api == "grpc" else "127.0.0.1:8471")
