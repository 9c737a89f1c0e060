"""Which workload to run, as a frozen record, checked on construction. Reads no file."""

import math
from dataclasses import dataclass
from typing import Any, Final

from jaxserve.errors import ConfigError
from jaxserve.schedulers.policy import not_found
from jaxserve.workload.feed import check_loop
from jaxserve.workload.generators.table import check_generator
from jaxserve.workload.readers.trace import CLIENT_FROM, FORMATS

TOO_LONG: Final = ("refuse", "cut")
DEFAULT_GENERATOR: Final = "fair_mix"
DEFAULT_NUM_REQUESTS: Final = 1000


def _require(condition: bool, field: str, got: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """A trace or a generated workload, what is changed of it, and when its requests are sent.

    `trace` is a file; without one, `workload` names a generator (empty: fair_mix). Fields of a
    trace alone: `trace_format`, `trace_from_s` and `trace_until_s` (None: its end), `client_from`,
    `jitter_s`. `rate`, `time_scale`, `length_scale` and `num_requests` are as in
    `scaling.scaled`; None: as it is (a generator: 1000 requests). `max_tokens` is the limit that
    each request states; 0: its own, which is exactly its output unless the trace says another.
    `too_long`: what happens to requests that exceed the model's context. `loop`, `concurrency` and
    `per_client` are as in `feed.Feed`. `seed` is of generators and of the jitter.
    """

    trace: str = ""
    trace_format: str = "auto"
    trace_from_s: float = 0.0
    trace_until_s: float | None = None
    client_from: str = "auto"
    jitter_s: float = 0.0
    workload: str = ""
    workload_options: tuple[str, ...] = ()
    seed: int = 0
    num_requests: int | None = None
    rate: float | None = None
    time_scale: float | None = None
    length_scale: float = 1.0
    max_tokens: int = 0
    too_long: str = "refuse"
    loop: str = "open"
    concurrency: int = 0
    per_client: bool = False

    def __post_init__(self) -> None:
        formats = ("auto", *FORMATS)
        if self.trace_format not in formats:
            raise ConfigError(not_found("trace_format", self.trace_format, formats))
        _require(
            self.client_from in CLIENT_FROM, "client_from", self.client_from, ", ".join(CLIENT_FROM)
        )
        _require(self.too_long in TOO_LONG, "too_long", self.too_long, ", ".join(TOO_LONG))
        _require(0 <= self.seed < 2**63, "workload_seed", self.seed, "0 to 2**63 - 1")
        _require(self.max_tokens >= 0, "workload_max_tokens", self.max_tokens, "0 or more")
        if self.num_requests is not None:
            _require(self.num_requests >= 1, "num_requests", self.num_requests, "1 or more")
        for field in ("rate", "time_scale", "length_scale"):
            value = getattr(self, field)
            good = value is None or (math.isfinite(value) and value > 0)
            _require(good, field, value, "a positive number")
        for field in ("trace_from_s", "jitter_s"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value >= 0, field, value, "0 or more")
        until_s = self.trace_until_s
        after = until_s is None or until_s > self.trace_from_s
        _require(after, "trace_until_s", until_s, f"more than {self.trace_from_s:g}, trace_from_s")
        self._check_source()
        self._check_times()

    def _check_source(self) -> None:
        if self.trace:
            allowed = "unset beside a trace; choose one of the two"
            _require(not self.workload, "workload", self.workload, allowed)
            options = self.workload_options
            _require(not options, "workload_options", options, "unset beside a trace")
            return
        for field, default in (
            ("trace_format", "auto"),
            ("trace_from_s", 0.0),
            ("trace_until_s", None),
            ("client_from", "auto"),
            ("jitter_s", 0.0),
        ):
            value = getattr(self, field)
            _require(value == default, field, value, "unset without a trace")
        check_generator(self.generator, self.workload_options)

    def _check_times(self) -> None:
        check_loop(self.loop, self.concurrency, per_client=self.per_client)
        allowed = "one of rate and time_scale"
        both = self.rate is not None and self.time_scale is not None
        _require(not both, "time_scale", self.time_scale, allowed)
        for field in ("rate", "time_scale"):
            value = getattr(self, field)
            read = value is None or self.loop != "closed"
            allowed = "unset with loop=closed, which sends when an earlier request ends"
            _require(read, field, value, allowed)
        twice = self.rate is not None and any(
            option.startswith("rate=") for option in self.workload_options
        )
        _require(not twice, "rate", self.rate, "unset beside workload_options=rate=...")

    @property
    def generator(self) -> str:
        """The generator's name; "" with a trace."""
        return "" if self.trace else self.workload or DEFAULT_GENERATOR
