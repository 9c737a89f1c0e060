"""What a simulation is told beside the engine's configuration. Knows no flags."""

import math
import re
from dataclasses import dataclass

from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Outage:
    """A replica is gone from `down_s` on; a fresh one is there at `up_s` (None: never)."""

    replica: int
    down_s: float
    up_s: float | None

    @classmethod
    def parse(cls, text: str) -> "Outage":
        """From "replica:down_s" or "replica:down_s:up_s". Raises ConfigError."""
        number = r"(\d+(?:\.\d*)?)"
        found = re.fullmatch(rf"(\d+):{number}(?::{number})?", text)
        if found is None:
            allowed = "<replica>:<seconds it fails at>[:<seconds it is back at>]"
            raise ConfigError(f"fail: got {text!r}; allowed: {allowed}")
        replica, down, up = found.groups()
        outage = cls(int(replica), float(down), None if up is None else float(up))
        if outage.up_s is not None and outage.up_s <= outage.down_s:
            raise ConfigError(f"fail: got {text!r}; allowed: a return after the failure")
        return outage


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """A fleet of `replicas` like replicas.

    `profile` names or is the file of the serving-time profile of their devices. `routing` and
    `routing_options` choose the replica of a request. `fail` are outages (`Outage.parse`).
    `report_s` is the time between load reports, `cache_event_s` how late the router hears of a
    cache's changes, `cache_event_loss` the share of such messages that it never hears of.
    `submit_s` is the way of a request from its client to a replica, `deliver_s` that of tokens back.
    `seed` is that of what is drawn here: noise and losses.
    """

    profile: str = ""
    replicas: int = 1
    routing: str = "round_robin"
    routing_options: tuple[str, ...] = ()
    fail: tuple[str, ...] = ()
    report_s: float = 1.0
    cache_event_s: float = 0.01
    cache_event_loss: float = 0.0
    submit_s: float = 0.0
    deliver_s: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= 100_000:
            raise ConfigError(f"replicas: got {self.replicas}; allowed: 1 to 100,000")
        for name in ("cache_event_s", "submit_s", "deliver_s", "noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: got {value}; allowed: 0 or more")
        if not (math.isfinite(self.report_s) and self.report_s > 0):
            raise ConfigError(f"report_s: got {self.report_s}; allowed: more than 0")
        if not 0 <= self.cache_event_loss <= 1:
            raise ConfigError(f"cache_event_loss: got {self.cache_event_loss}; allowed: 0 to 1")
        for outage in self.outages:
            if outage.replica >= self.replicas:
                raise ConfigError(
                    f"fail: got replica {outage.replica}; allowed: 0 to {self.replicas - 1}"
                )

    @property
    def outages(self) -> tuple[Outage, ...]:
        return tuple(map(Outage.parse, self.fail))
