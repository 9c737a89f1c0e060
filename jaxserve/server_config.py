"""Configuration of the commands beside the engine's, as frozen records. Knows no flags.

`EngineConfig` in `jaxserve/config.py` says what an engine process needs; this says what the front
end and the command line need.
"""

import math
from dataclasses import dataclass

from jaxserve.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
CONVERT_DTYPES = ("auto", "bfloat16", "float32")


def _require(condition: bool, field: str, got: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The front end. `port` 0 takes any free one."""

    host: str = "127.0.0.1"
    port: int = 8470
    drain_s: float = 30.0
    max_message_mb: float = 16.0

    def __post_init__(self) -> None:
        _require(bool(self.host), "host", self.host, "a host name or address; try 127.0.0.1")
        _require(0 <= self.port <= 65535, "port", self.port, "0 (any free one) to 65535")
        drain_s, mb = self.drain_s, self.max_message_mb
        _require(math.isfinite(drain_s) and drain_s >= 0, "drain_s", drain_s, "0 or more seconds")
        _require(0 < mb <= 1024, "max_message_mb", mb, "a number in (0, 1024]")


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

    `server` "" runs the engine in this process.
    """

    prompt: str = ""
    token_ids: str = ""
    server: str = ""
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


def _is_number(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdigit()
