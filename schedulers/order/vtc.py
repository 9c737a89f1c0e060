"""Virtual token counter: the client that was served least is next.

Source: "Fairness in Serving Large Language Models" (arXiv 2401.00588) and Ying1123/VTC-artifact;
papers.md 4.1. Beyond them: weights, a price of cached tokens, and recomputation is not charged
twice. The lift on an idle system comes from a re-implementation, so it is a switch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..events import Abort, Admit, Arrive, Enact, Event, Finish, Preempt, RequestNumber, Takes, Tick
from ..parameters import price
from ..ranking import Ranking
from .base import Extremes
from .charges import Bill, Charges, IdleClients, Prices


@dataclass(frozen=True, slots=True)
class VtcParameters:
    """Prices per token. `lift`: who was away starts level with the least served of those in the
    queue; without it (LCF) service that was not asked for is owed. `idle_lift`: who finds the
    queue empty starts level with who left it last; without, whoever ran alone for long would have
    to wait until a newcomer got as much."""

    w_in: float = 1.0
    w_out: float = 2.0
    price_cached: float = 1.0
    lift: bool = True
    idle_lift: bool = True

    def __post_init__(self) -> None:
        for name in ("w_in", "w_out", "price_cached"):
            price(name, getattr(self, name))


@dataclass(slots=True, eq=False)
class _Client:
    """`counter` is the service charged so far, by weight, and what it was lifted by; `charged` is
    the charges alone, not by weight. `waiting` is its queue, by arrival."""

    name: str
    weight: float
    counter: float = 0.0
    charged: float = 0.0
    waiting: Ranking[RequestNumber, None] = field(default_factory=Ranking)
    num_requests: int = 0


class Vtc:
    """Fair by client, blind to prefixes. Work conserving; inside a client first come, first served.

    A client's counter rises by what its requests are charged, over its weight. Who was away is
    lifted to the least counter of those in the queue, so that nobody saves up service. A pass ends
    at a misfit.
    """

    def __init__(self, parameters: VtcParameters | None = None):
        self._parameters = parameters or VtcParameters()
        known = self._parameters
        self.prices = Prices(known.w_in, known.w_out, known.price_cached)
        self._charges = Charges(self.prices)
        self._clients: dict[str, _Client] = {}
        self._idle = IdleClients(self._clients.pop)
        # By counter and name, those with a queue.
        self._queued: Ranking[tuple[float, str], _Client] = Ranking()
        self._arrivals: dict[RequestNumber, Arrive] = {}
        self._running: dict[RequestNumber, _Client] = {}
        self._sorted: list[RequestNumber] | None = None  # who runs, until something happens
        self._last_left: _Client | None = None  # the queue
        self._now_s = 0.0
        self._takes: Takes = {
            Arrive: self._arrive,
            Admit: self._admit,
            Enact: self._enact,
            Preempt: self._preempt,
            Finish: self._end,
            Abort: self._end,
            Tick: self._tick,
        }

    def on(self, event: Event) -> None:
        take = self._takes.get(type(event))
        if take is not None:
            take(event)

    def next(self) -> RequestNumber | None:
        if not self._queued:
            return None
        return self._queued[self._queued.least()].waiting.least()

    def waiting(self) -> Iterator[RequestNumber]:
        for key in self._queued.ascending():
            yield from self._queued[key].waiting.ascending()

    def running(self) -> list[RequestNumber]:
        """Who is charged least in front, so that the most overdrawn client gives way first."""
        if self._sorted is None:
            ranks = [(client.counter, number) for number, client in self._running.items()]
            ranks.sort()
            self._sorted = [number for _, number in ranks]
        return list(self._sorted)

    def counters(self) -> dict[str, float]:
        """What every remembered client was charged, by weight."""
        return {client.name: client.counter for client in self._clients.values()}

    def charged(self, client: str) -> float:
        return self._clients[client].charged

    def credit(self, client: str) -> None:
        return None

    def service_bound(self, seen: Extremes) -> float | None:
        """2 U with U = w_in * longest prompt + w_out * rows of a client * longest output, of what
        was seen so far, and beyond that what was given back. None without both lifts.

        Who has the least counter is admitted, and is ahead by that prompt and by what its rows
        make before all end, at most. The published max(w_in * prompt, w_out * tokens of a batch)
        may be less than that, where prompts cost more than outputs.
        """
        if not (self._parameters.lift and self._parameters.idle_lift):
            return None
        prices = self.prices
        priciest = prices.w_in * max(1.0, prices.price_cached)
        output = prices.w_out * seen.rows * seen.output
        refund = seen.rows * (priciest * seen.refund + prices.w_out * seen.overrun)
        return 2 * (priciest * seen.prompt + output + refund) / seen.least_weight

    def _tick(self, event: Tick) -> None:
        self._now_s = event.now_s
        self._idle.tick(event.now_s)

    def _arrive(self, event: Arrive) -> None:
        client = self._clients.get(event.client)
        if client is None:
            client = self._clients[event.client] = _Client(event.client, event.weight)
        self._idle.discard(client.name)
        client.weight = event.weight  # a key's may have changed
        self._arrivals[event.number] = event
        self._charges.arrived(event)
        client.num_requests += 1
        if not client.waiting:
            self._lift(client)
        self._join(client, event.number)

    def _admit(self, event: Admit) -> None:
        number = event.number
        client = self._clients[self._arrivals[number].client]
        self._leave(client, number)
        self._running[number] = client
        self._sorted = None
        self._charge(client, self._charges.admitted(number, event.num_extend_tokens))

    def _enact(self, event: Enact) -> None:
        for client, bill in self._charges.enacted(event.ran, self._running).items():
            self._charge(client, bill)

    def _preempt(self, event: Preempt) -> None:
        client = self._stop(event.number)
        self._join(client, event.number)

    def _stop(self, number: RequestNumber) -> _Client:
        client = self._running.pop(number)
        self._sorted = None
        self._charge(client, self._charges.stopped(number))
        return client

    def _lift(self, client: _Client) -> None:
        if not self._parameters.lift:
            return
        if self._queued:
            client.counter = max(client.counter, self._queued.least()[0])
        elif self._parameters.idle_lift and self._last_left is not None:
            client.counter = max(client.counter, self._last_left.counter)

    def _join(self, client: _Client, number: RequestNumber) -> None:
        if not client.waiting:
            self._queued.put((client.counter, client.name), client)
        client.waiting.put(number, None)

    def _leave(self, client: _Client, number: RequestNumber) -> None:
        del client.waiting[number]
        if not client.waiting:
            del self._queued[client.counter, client.name]
            self._last_left = client

    def _charge(self, client: _Client, bill: Bill) -> None:
        charge, _ = bill
        if not charge:
            return
        self._sorted = None
        if client.waiting:
            del self._queued[client.counter, client.name]
        client.charged += charge
        client.counter += charge / client.weight
        if client.waiting:
            self._queued.put((client.counter, client.name), client)

    def _end(self, event: Finish | Abort) -> None:
        number = event.number
        client = self._clients[self._arrivals.pop(number).client]
        if number in self._running:
            self._stop(number)
        else:
            self._leave(client, number)
        self._charges.forget(number)
        client.num_requests -= 1
        if not client.num_requests:
            if self._is_lifted_anyway(client):
                del self._clients[client.name]
            else:
                self._idle.add(client.name, self._now_s)

    def _is_lifted_anyway(self, client: _Client) -> bool:
        """Whether it would be brought to where the others are, remembered or not: also if they are
        gone by then, which takes both lifts."""
        if not (self._parameters.lift and self._parameters.idle_lift and self._queued):
            return False
        return client.counter <= self._queued.least()[0]
