"""Who sends, when, with which weight and patience: what all generators have in common.

Knows nothing of prompts. A *start* is one arrival: a request, or the first of several.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Literal

from jaxserve.schedulers.parameters import not_negative, positive, require
from jaxserve.workload.generators.streams import MOST_CLIENTS, Purpose, Streams


@dataclass(frozen=True, slots=True)
class Traffic:
    """Settings of every generator.

    `rate` is requests per second on average, of all clients together before one is greedy.
    `arrivals` of each client: independent (poisson), bursty with gaps of coefficient of variation
    `cv` (gamma), poisson for about `on_s` and then silent for about `off_s` (on_off), or even.
    `skew` is the Zipf exponent of the clients' rates (0: all alike), `weights` are given to clients
    in turn, `greedy` multiplies the rate of the first client, which is then called greedy.
    A share `aborts` of the requests hang up after `abort_s` on average; `deadline_s` 0: none.
    """

    rate: float = 8.0
    arrivals: Literal["poisson", "gamma", "on_off", "even"] = "poisson"
    cv: float = 0.0
    on_s: float = 0.0
    off_s: float = 0.0
    clients: int = 1
    skew: float = 0.0
    weights: str = "1"
    greedy: float = 1.0
    block_size: int = 16
    deadline_s: float = 0.0
    aborts: float = 0.0
    abort_s: float = 0.0


def check_traffic(traffic: Traffic) -> None:
    """Raises ValueError for settings that are wrong, or that would not be read."""
    positive("rate", traffic.rate)
    for name, arrivals in (("cv", "gamma"), ("on_s", "on_off"), ("off_s", "on_off")):
        value = getattr(traffic, name)
        if traffic.arrivals == arrivals:
            require(
                math.isfinite(value) and value > 0,
                name,
                value,
                f"a positive number with arrivals={arrivals}",
            )
        else:
            require(value == 0, name, value, f"unset unless arrivals={arrivals}")
    require(
        1 <= traffic.clients <= MOST_CLIENTS, "clients", traffic.clients, f"1 to {MOST_CLIENTS}"
    )
    not_negative("skew", traffic.skew)
    parse_weights(traffic.weights)
    positive("greedy", traffic.greedy)
    alone = traffic.clients == 1 and traffic.greedy != 1
    require(not alone, "greedy", traffic.greedy, "1 unless there are 2 clients or more")
    require(1 <= traffic.block_size <= 2**20, "block_size", traffic.block_size, "1 to 1048576")
    not_negative("deadline_s", traffic.deadline_s)
    require(0 <= traffic.aborts <= 1, "aborts", traffic.aborts, "a share from 0 to 1")
    not_negative("abort_s", traffic.abort_s)
    read = (traffic.abort_s > 0) == (traffic.aborts > 0)
    require(read, "abort_s", traffic.abort_s, "positive with aborts, unset without")


def parse_weights(text: str) -> tuple[float, ...]:
    """Weights such as "1,2". Raises ValueError."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    good = bool(weights) and all(math.isfinite(weight) and weight > 0 for weight in weights)
    require(good, "weights", text, "positive numbers such as 1,2, taken in turn")
    return weights


def client_rates(traffic: Traffic) -> list[float]:
    """Requests per second of each client."""
    shares = [(i + 1) ** -traffic.skew for i in range(traffic.clients)]
    rates = [traffic.rate * share / sum(shares) for share in shares]
    rates[0] *= traffic.greedy
    return rates


def client_names(traffic: Traffic, prefix: str = "") -> list[str]:
    digits = len(str(traffic.clients - 1))
    names = [f"{prefix}client-{i:0{digits}}" for i in range(traffic.clients)]
    if traffic.greedy != 1:
        names[0] = f"{prefix}greedy"
    return names


def starts_s(traffic: Traffic, streams: Streams, client: int, rate: float) -> Iterator[float]:
    """Times at which a client starts, `rate` per second on average; never ends."""
    match traffic.arrivals:
        case "even":
            # Clients are set off against each other: all at once would be a burst.
            phase = (client + 1) / traffic.clients
            return ((number + phase) / rate for number in count())
        case "on_off":
            return _on_off(traffic, streams, client, rate)
        case "gamma":
            shape = traffic.cv**-2
            scale = 1 / (shape * rate)
            gaps = streams.values(
                client, Purpose.ARRIVALS, lambda rng, n: rng.gamma(shape, scale, n)
            )
        case "poisson":
            gaps = _gaps(streams, client, Purpose.ARRIVALS, 1 / rate)
    return accumulate(gaps)


def _gaps(streams: Streams, client: int, purpose: Purpose, mean_s: float) -> Iterator[float]:
    return streams.values(client, purpose, lambda rng, n: rng.exponential(mean_s, n))


def _on_off(traffic: Traffic, streams: Streams, client: int, rate: float) -> Iterator[float]:
    """Poisson in time that passes only while the client is on; silences are put in between."""
    share_on = traffic.on_s / (traffic.on_s + traffic.off_s)
    periods = _gaps(streams, client, Purpose.PERIODS, 1.0)
    # A client is as likely off at the beginning as at any other time.
    begins_off = -math.expm1(-next(periods)) > share_on
    silent_s = traffic.off_s * next(periods) if begins_off else 0.0
    on_ends_s = traffic.on_s * next(periods)
    for at_s in accumulate(_gaps(streams, client, Purpose.ARRIVALS, share_on / rate)):
        while at_s > on_ends_s:
            silent_s += traffic.off_s * next(periods)
            on_ends_s += traffic.on_s * next(periods)
        yield at_s + silent_s
