"""Configuration of a simulation beside the engine's. Knows no flags."""

import math
import re
from dataclasses import dataclass
from typing import Final

from jaxserve.errors import ConfigError
from jaxserve.schedulers.catalog import make_routing

MOST_REPLICAS: Final = 100_000
_REPLICAS: Final = f"1 to {MOST_REPLICAS}"


def _require(condition: bool, field: str, got: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}; allowed: {allowed}")


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
    """A fleet of `replicas` that are all alike.

    `profile` names, or is the file of, the serving-time profile of their devices; `noise` times its
    spread scatters slice times (0: they are what is predicted). `max_context` bounds prompt and
    output of a request, 0: as the profile's model does. `routing` and `routing_options` choose a
    request's replica, unless `pool` and `pool_options` plan over all of them. `blind` lets policies
    run on a workload that lacks what they need, prefixes or clients. `fail` are outages, as
    `Outage.parse` takes them.

    `report_s` is the time between load reports. `cache_event_s` is how late the router hears of a
    cache's changes, `cache_event_loss` the share of such messages it never hears of. `submit_s` is
    the way of a request from client to replica, `deliver_s` that of its tokens back. `seed` is of
    what is drawn here: noise and losses.
    """

    profile: str = "h200-llama3-8b-bf16"
    noise: float = 0.0
    max_context: int = 0
    replicas: int = 1
    routing: str = "round_robin"
    routing_options: tuple[str, ...] = ()
    pool: str = ""
    pool_options: tuple[str, ...] = ()
    blind: bool = False
    fail: tuple[str, ...] = ()
    report_s: float = 1.0
    cache_event_s: float = 0.01
    cache_event_loss: float = 0.0
    submit_s: float = 0.0
    deliver_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(1 <= self.replicas <= MOST_REPLICAS, "replicas", self.replicas, _REPLICAS)
        _require(self.max_context >= 0, "max_context", self.max_context, "0 or more")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        for field in ("noise", "cache_event_s", "submit_s", "deliver_s"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value >= 0, field, value, "0 or more")
        good = math.isfinite(self.report_s) and self.report_s > 0
        _require(good, "report_s", self.report_s, "more than 0")
        loss = self.cache_event_loss
        _require(0 <= loss <= 1, "cache_event_loss", loss, "a share in [0, 1]")
        try:
            make_routing(self.routing, self.routing_options, num_replicas=1, page_size=1)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for outage in self.outages:
            allowed = f"replicas 0 to {self.replicas - 1}"
            _require(outage.replica < self.replicas, "fail", outage.replica, allowed)

    @property
    def outages(self) -> tuple[Outage, ...]:
        return tuple(map(Outage.parse, self.fail))
