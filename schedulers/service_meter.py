"""What each client was served, and how far clients with work throughout are apart.

Knows events and an order, which it passes them on to. Knows no engine, no clock.

Service is priced as the order prices it, or at 1 for a prompt token and 2 for an output token:
with all prompt tokens, or with those alone that were not found cached. Tokens that are computed
again after a preemption are not counted again.

The gap is about the present window: the time since which all clients with waiting requests have had
some at every moment. In it an order that charges clients is measured by what it charged, since that
is what its bound speaks of; any other one by service without cached tokens.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .events import Abort, Admit, Arrive, Enact, Event, Finish, Preempt, RequestNumber, Tick
from .jain import jain
from .order.base import Extremes, FairOrder, Order
from .order.charges import MOST_IDLE, IdleClients, Prefill, Prices, num_known

DEFAULT_PRICES: Final = Prices(w_in=1.0, w_out=2.0, price_cached=0.0)
"""Of orders that charge nobody."""
MOST_COMPARED: Final = 64
"""Clients whose service is compared: each that joins costs a look at all of them."""


@dataclass(frozen=True, slots=True)
class ClientService:
    """One client's tokens since it was first known: prompt tokens computed, prompt tokens found
    cached, output tokens. `credit` is None where the order keeps none."""

    client: str
    weight: float
    computed: int
    cached: int
    output: int
    service: float
    service_uncached: float
    credit: float | None


@dataclass(slots=True)
class ServiceWindow:
    """The present window: `clients` that waited throughout, for `seconds`. Never changed once made;
    not frozen, which takes three times as long.

    `gap` is the most service beyond the least, each by weight; `bound` is what the order promises
    about it, if it does; `jain` is Jain's index, if there are two clients and any service.
    """

    clients: int
    seconds: float
    gap: float
    bound: float | None
    jain: float | None


@dataclass(slots=True, eq=False)
class _Client:
    """Its tokens, and how many of its requests wait and run."""

    name: str
    weight: float
    computed: int = 0
    cached: int = 0
    output: int = 0
    waiting: int = 0
    running: int = 0


@dataclass(slots=True, eq=False)
class _Request(Prefill):
    """Its prompt tokens that were `computed`, nothing twice, and output tokens that were `made`."""

    client: _Client
    num_prompt_tokens: int
    num_samples: int
    admitted: bool = False
    running: bool = False
    computed: int = 0
    made: int = 0


@dataclass(slots=True, eq=False)
class _Stay:
    """A client that waits since `since_s`; `at` is what those that wait since had got by then."""

    client: _Client
    since_s: float
    at: dict[str, float]


class ServiceMeter:
    """An order, metered: what happens to requests is told to the order, then counted. What the
    cache holds is nothing to the meter, and may be told to the order alone."""

    def __init__(self, order: Order):
        self.order = order
        fair = order if isinstance(order, FairOrder) else None
        self._fair = fair
        self._tell = order.on
        self.next = order.next
        self.waiting = order.waiting
        self.running = order.running
        self._prices = DEFAULT_PRICES if fair is None else fair.prices
        self._served = self._uncached if fair is None else lambda client: fair.charged(client.name)
        self._clients: dict[str, _Client] = {}
        self._idle = IdleClients(self._clients.pop)
        self._requests: dict[RequestNumber, _Request] = {}
        self._stays: dict[str, _Stay] = {}  # longest first
        self._now_s = 0.0
        self._prompt = self._extend = self._output = self._refund = self._rows = 0
        self._overrun = 0
        self._handlers: dict[type, Callable[[Any], None]] = {
            Enact: self._enact,
            Arrive: self._arrive,
            Admit: self._admit,
            Preempt: self._preempt,
            Finish: self._end,
            Abort: self._end,
            Tick: self._tick,
        }

    # The order.

    def on(self, event: Event) -> None:
        self._tell(event)
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    # Reports.

    @property
    def num_clients(self) -> int:
        """Those that are remembered."""
        return len(self._clients)

    def clients(self, *, most: int = MOST_IDLE, name: str = "") -> list[ClientService]:
        """At most so many clients, those with most service first; with a name, that one alone."""
        if name:
            known = self._clients.get(name)
            return [] if known is None else [self._report(known)]
        biggest = heapq.nlargest(most, self._clients.values(), key=self._all)
        return [self._report(client) for client in biggest]

    def window(self) -> ServiceWindow:
        """The window up to now."""
        stays = list(self._stays.values())
        if not stays:
            return ServiceWindow(0, 0.0, 0.0, self._bound(1.0), None)
        newest = stays[-1]
        seconds = self._now_s - newest.since_s
        clients = [stay.client for stay in stays]
        if len(clients) == 1:
            return ServiceWindow(1, seconds, 0.0, self._bound(clients[0].weight), None)
        served = [
            (self._served(client) - newest.at[client.name]) / client.weight for client in clients
        ]
        return ServiceWindow(
            clients=len(stays),
            seconds=seconds,
            gap=max(served) - min(served),
            bound=self._bound(min(client.weight for client in clients)),
            jain=jain(served),
        )

    def values(self) -> Mapping[str, float]:
        """The window in numbers by name, without those that mean nothing now."""
        window = self.window()
        numbers = {
            "clients_known": self.num_clients,
            "clients_backlogged": window.clients,
            "service_window_seconds": window.seconds,
            "service_gap_tokens": window.gap,
            "service_gap_bound_tokens": window.bound,
            "jain_service": window.jain,
        }
        return {name: float(number) for name, number in numbers.items() if number is not None}

    def _report(self, client: _Client) -> ClientService:
        return ClientService(
            client=client.name,
            weight=client.weight,
            computed=client.computed,
            cached=client.cached,
            output=client.output,
            service=self._all(client),
            service_uncached=self._uncached(client),
            credit=None if self._fair is None else self._fair.credit(client.name),
        )

    def _all(self, client: _Client) -> float:
        return self._uncached(client) + self._prices.w_in * client.cached

    def _uncached(self, client: _Client) -> float:
        return self._prices.w_in * client.computed + self._prices.w_out * client.output

    def _bound(self, least_weight: float) -> float | None:
        if self._fair is None:
            return None
        running = (request.made for request in self._requests.values() if request.running)
        extremes = Extremes(
            prompt=self._prompt,
            extend=self._extend,
            output=max(self._output, max(running, default=0)),
            refund=self._refund,
            overrun=self._overrun,
            rows=self._rows,
            least_weight=least_weight,
        )
        return self._fair.service_bound(extremes)

    # Events.

    def _tick(self, event: Tick) -> None:
        self._now_s = event.now_s
        self._idle.tick(event.now_s)

    def _arrive(self, event: Arrive) -> None:
        self._now_s = max(self._now_s, event.arrived_s)
        client = self._clients.get(event.client)
        if client is None:
            client = self._clients[event.client] = _Client(event.client, event.weight)
        self._idle.discard(client.name)
        if client.weight != event.weight:  # a key's may have changed
            client.weight = event.weight
            self._stays.pop(client.name, None)
        self._requests[event.number] = _Request(client, event.num_prompt_tokens, event.num_samples)
        self._prompt = max(self._prompt, event.num_prompt_tokens)
        self._join(client)

    def _admit(self, event: Admit) -> None:
        request = self._requests[event.number]
        client, extend = request.client, event.num_extend_tokens
        if not request.admitted:
            client.cached += max(0, request.num_prompt_tokens - extend)
        request.admitted = request.running = True
        known = num_known(
            request.computed, request.made, request.num_prompt_tokens, request.num_samples
        )
        request.begin(extend, known)
        client.running += 1
        self._leave(client)
        self._extend = max(self._extend, extend)
        self._rows = max(self._rows, client.running)

    def _enact(self, event: Enact) -> None:
        requests = self._requests
        for number, num_prompt, num_output in event.ran:
            request = requests[number]
            if num_prompt:
                fresh = request.run(num_prompt)
                request.computed += fresh
                request.client.computed += fresh
            if num_output < 0:  # it never counted
                self._output = max(self._output, request.made)
                self._overrun = max(self._overrun, -num_output)
            request.made += num_output
            request.client.output += num_output

    def _preempt(self, event: Preempt) -> None:
        request = self._requests[event.number]
        self._stop(request)
        self._join(request.client)

    def _end(self, event: Finish | Abort) -> None:
        request = self._requests.pop(event.number)
        client = request.client
        if request.running:
            self._stop(request)
        else:
            self._leave(client)
        if not client.waiting and not client.running:
            self._idle.add(client.name, self._now_s)

    def _stop(self, request: _Request) -> None:
        self._output = max(self._output, request.made)
        refund = request.stop()
        if not request.ran:
            refund += max(0, request.num_prompt_tokens - request.extend)
        self._refund = max(self._refund, refund)
        request.running = False
        request.client.running -= 1

    # Who waits.

    def _join(self, client: _Client) -> None:
        """One of its requests waits from now on."""
        client.waiting += 1
        if client.name in self._stays or len(self._stays) >= MOST_COMPARED:
            return
        at: dict[str, float] = {}
        if self._stays:  # who is the first to wait is compared with nobody
            at = {name: self._served(stay.client) for name, stay in self._stays.items()}
            at[client.name] = self._served(client)
        self._stays[client.name] = _Stay(client, self._now_s, at)

    def _leave(self, client: _Client) -> None:
        """One of its requests waits no longer."""
        client.waiting -= 1
        if not client.waiting:
            self._stays.pop(client.name, None)
