"""Deficit longest prefix match: local like lpm, fair like vtc, with a bound that a quantum sets.

Source: "Locality-aware Fair Scheduling in LLM Serving" (arXiv 2501.14312). The rules come from two
re-implementations that agree but for what is a switch here; papers.md 3. What triggers a refill in
the paper itself, newcomers' credit and the quanta are reconstruction; weights, refunds, uncharged
recomputation and `client_age_limit_s` are project rules.

Bounds (derived, papers.md 3.6), with U = w_in * longest extend + w_out * most requests of a client
that run * longest output: credits stay in [-U, Q]; two clients with work throughout are charged
within Q + U of each other from a start at zero, within 2 (Q + U) over any interval, by weight.

A pass begins at a `Tick`. It goes past `max_skips` requests that do not fit, and looks past as many
of each client that a scan in mid-pass has left behind, so that its cost stays bounded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Final, Literal

from ..events import (
    Abort,
    Admit,
    Arrive,
    Enact,
    Event,
    Finish,
    Misfit,
    Preempt,
    RequestNumber,
    Takes,
    Tick,
)
from ..parameters import not_negative, price, require
from ..ranking import Ranking
from ..waiting_tree import WaitingTree, longest_match
from .base import Extremes
from .charges import NOTHING, Bill, Charges, IdleClients, Prices

LEAST_QUANTUM: Final = 1e-6
MOST_QUANTUM: Final = 1e18
"""Of a client, whatever its weight: rounds and credits stay numbers."""


@dataclass(frozen=True, slots=True)
class DlpmParameters:
    """`quantum` is what a refill gives a client of weight 1, in priced tokens.

    `new_client_credit`: a newcomer starts with nothing, or with a quantum (then a client with many
    names gains credit). `refill_scope`: who keeps a refill from happening while it has credit:
    clients with a queue, or also those that only run. `charge_at`: prompt tokens are charged on
    admission, or as they are run. `client_age_limit_s`: a request that has waited longer goes first
    among its client's; 0 is off.

    `refill_when`: at the end of a pass refills, and scans the queue anew; in the middle of it
    refills when the scan comes to a request and nobody has credit, and goes on downwards: who was
    passed over waits for the next pass. `misfit`: a request that does not fit ends the pass, or is
    passed over; nobody is refilled while its client has credit. `max_skips`: how many that do not
    fit a pass goes past, and how many of a client it looks past in mid-pass. `recharge_recompute`:
    tokens that are computed again after a preemption are charged again.
    """

    quantum: float = 8192.0
    w_in: float = 1.0
    w_out: float = 2.0
    price_cached: float = 0.0
    refill_scope: Literal["queued", "queued_or_running"] = "queued"
    new_client_credit: Literal["0", "quantum"] = "0"
    charge_at: Literal["admit", "enacted"] = "admit"
    client_age_limit_s: float = 0.0
    refill_when: Literal["end_of_pass", "mid_pass"] = "end_of_pass"
    misfit: Literal["stop", "skip"] = "stop"
    max_skips: int = 16
    recharge_recompute: bool = False

    def __post_init__(self) -> None:
        allowed = "a positive number, from 0.001 to 1e12"
        require(1e-3 <= self.quantum <= 1e12, "quantum", self.quantum, allowed)
        require(self.max_skips >= 0, "max_skips", self.max_skips, "0 or more")
        not_negative("client_age_limit_s", self.client_age_limit_s)
        for name in ("w_in", "w_out", "price_cached"):
            price(name, getattr(self, name))


@dataclass(slots=True, eq=False)
class _Client:
    """`credit` is what is left of its quanta, `held` what planned tokens will be charged, `charged`
    what was, with what is held.

    `since` says when its waiting requests came, by number; `key` is where the index has it.
    """

    name: str
    quantum: float
    credit: float
    held: float = 0.0
    charged: float = 0.0
    since: Ranking[RequestNumber, float] = field(default_factory=Ranking)
    num_running: int = 0
    key: tuple[Any, ...] | None = None

    @property
    def free_credit(self) -> float:
        """What decides: planned tokens count as charged."""
        return self.credit - self.held

    @property
    def rounds(self) -> int:
        """Refills until it has credit."""
        return math.floor(-self.free_credit / self.quantum) + 1


class Dlpm:
    """Longest match first among the clients that have credit; when none has, all get a quantum.

    One request may overdraw. Who runs is never stopped for lack of credit. Work conserving; inside
    a client a cold request can starve behind hot ones unless `client_age_limit_s` is set.
    """

    def __init__(self, parameters: DlpmParameters | None = None):
        self._parameters = known = parameters or DlpmParameters()
        self.prices = Prices(
            known.w_in,
            known.w_out,
            known.price_cached,
            at_enactment=known.charge_at == "enacted",
            recharge=known.recharge_recompute,
        )
        self._charges = Charges(self.prices)
        self._clients: dict[str, _Client] = {}
        self._queued: dict[_Client, None] = {}  # those with a queue
        self._without: dict[_Client, None] = {}  # those that are known and have no credit
        self._idle = IdleClients(self._forget)
        self._tree = WaitingTree()  # a lane per client
        self._ready: Ranking[Any, _Client] = Ranking()  # those with credit and a queue
        self._moved: dict[_Client, None] = {}  # who may stand elsewhere now, until somebody asks
        self._arrivals: dict[RequestNumber, Arrive] = {}
        self._running: dict[RequestNumber, _Client] = {}
        self._sorted: list[RequestNumber] | None = None  # who runs, until something happens
        self._now_s = 0.0
        # Of this pass: how far down its scan came, who did not fit, whose requests were passed.
        self._scanned: tuple[Any, ...] | None = None
        self._misfits: set[RequestNumber] = set()
        self._passed: dict[_Client, None] = {}
        self._takes: Takes = {
            Enact: self._enact,
            Arrive: self._arrive,
            Admit: self._admit,
            Misfit: self._misfit,
            Preempt: self._preempt,
            Finish: self._end,
            Abort: self._end,
            Tick: self._tick,
            **self._tree.takes,
        }

    def on(self, event: Event) -> None:
        take = self._takes.get(type(event))
        if take is not None:
            take(event)

    def next(self) -> RequestNumber | None:
        self._settle()
        for _ in range(2):  # a debt of many rounds may round to no credit: what is left is exact
            if self._ready or not self._refill():
                break
            self._settle()
        return self._ready.least()[-1] if self._ready else None

    def waiting(self) -> Iterator[RequestNumber]:
        """Client by client, those with credit first; who follows an admission is not foreseen."""
        self._settle()
        ready = (self._ready[key] for key in self._ready.ascending())
        others = (client for client in self._queued if client.key is None)
        for client in chain(ready, others):
            yield from (rank[-1] for rank in self._tree.ranks(client.name))

    def running(self) -> list[RequestNumber]:
        """Most credit in front, so that the most overdrawn client gives way first."""
        if self._sorted is None:
            ranks = [(-client.credit, number) for number, client in self._running.items()]
            ranks.sort()
            self._sorted = [number for _, number in ranks]
        return list(self._sorted)

    def credits(self) -> dict[str, float]:
        """Every known client's credit, in priced tokens."""
        return {client.name: client.credit for client in self._clients.values()}

    def charged(self, client: str) -> float:
        return self._clients[client].charged

    def credit(self, client: str) -> float | None:
        known = self._clients.get(client)
        return None if known is None else known.credit

    def service_bound(self, seen: Extremes) -> float:
        """2 (Q + U), where U is made of what was seen so far, and what was given back may lift a
        credit beyond Q. Tokens in flight are charged when they are parsed, and count from then."""
        prices = self.prices
        extend = prices.w_in * (seen.extend + prices.price_cached * seen.prompt)
        overdraft = extend + prices.w_out * seen.rows * seen.output
        prompts = prices.w_in * max(1.0, prices.price_cached) * seen.refund
        refund = seen.rows * (prompts + prices.w_out * seen.overrun)
        return 2 * (self._parameters.quantum + (overdraft + refund) / seen.least_weight)

    # Credit.

    def _refill(self) -> bool:
        """As few rounds as give somebody who waits credit, to every known client without; whether
        there was need of it."""
        if not self._queued:
            return False
        active = set(self._queued)
        if self._parameters.refill_scope == "queued_or_running":
            active.update(self._running.values())
        if not active <= self._without.keys():
            return False
        if all(self._next_key(client) is None for client in self._queued):
            return False  # the scan comes to nobody
        rounds = min(client.rounds for client in active)
        for client in list(self._without):
            client.credit += min(rounds, client.rounds) * client.quantum
            self._sorted = None
            self._note_credit(client)
        return True

    def _charge(self, client: _Client, bill: Bill) -> None:
        if bill is NOTHING:
            return
        charge, hold = bill
        had_credit = client.credit > client.held
        client.credit -= charge
        client.held += hold
        client.charged += charge + hold
        self._sorted = None
        if had_credit is not (client.credit > client.held):
            self._note_credit(client)

    def _note_credit(self, client: _Client) -> None:
        """The client may have credit now, or none."""
        if client.free_credit > 0:
            self._without.pop(client, None)
        else:
            self._without[client] = None
        self._place(client)

    def _forget(self, name: str) -> None:
        self._without.pop(self._clients.pop(name), None)

    # Requests.

    def _enact(self, event: Enact) -> None:
        for client, bill in self._charges.enacted(event.ran, self._running).items():
            self._charge(client, bill)

    def _arrive(self, event: Arrive) -> None:
        client = self._clients.get(event.client)
        quantum = max(LEAST_QUANTUM, min(event.weight * self._parameters.quantum, MOST_QUANTUM))
        if client is None:
            credit = quantum if self._parameters.new_client_credit == "quantum" else 0.0
            client = self._clients[event.client] = _Client(event.client, quantum, credit)
            self._note_credit(client)
        self._idle.discard(client.name)
        if quantum != client.quantum:  # a key's weight may have changed
            client.quantum, client.credit = quantum, min(client.credit, quantum)
            self._sorted = None
            self._note_credit(client)
        self._arrivals[event.number] = event
        self._charges.arrived(event)
        self._queue(client, event, event.num_cached)

    def _queue(self, client: _Client, event: Arrive, num_cached: int) -> None:
        self._tree.add((event.number,), event.page_keys, num_cached, lane=client.name)
        client.since.put(event.number, event.arrived_s)
        self._queued[client] = None
        self._place(client)

    def _unqueue(self, client: _Client, number: RequestNumber) -> None:
        self._tree.remove((number,))
        del client.since[number]
        if not client.since:
            del self._queued[client]
        self._place(client)

    def _admit(self, event: Admit) -> None:
        number = event.number
        client = self._clients[self._arrivals[number].client]
        self._scan_to(number)
        self._unqueue(client, number)
        client.num_running += 1
        self._running[number] = client
        self._charge(client, self._charges.admitted(number, event.num_extend_tokens))

    def _stop(self, number: RequestNumber) -> _Client:
        client = self._running.pop(number)
        client.num_running -= 1
        self._sorted = None
        self._charge(client, self._charges.stopped(number))
        return client

    def _preempt(self, event: Preempt) -> None:
        client = self._stop(event.number)
        self._queue(client, self._arrivals[event.number], event.num_cached)

    def _end(self, event: Finish | Abort) -> None:
        number = event.number
        if number in self._running:
            client = self._stop(number)
        else:
            client = self._clients[self._arrivals[number].client]
            self._unqueue(client, number)
        del self._arrivals[number]
        self._charges.forget(number)
        if not client.since and not client.num_running:
            self._idle.add(client.name, self._now_s)

    def _misfit(self, event: Misfit) -> None:
        """For the rest of the pass the scan is past it; where it ends the pass, nothing changes."""
        known = self._parameters
        if known.misfit == "skip" and len(self._misfits) < known.max_skips:
            self._scan_to(event.number)
            self._misfits.add(event.number)
            self._place(self._clients[self._arrivals[event.number].client])

    def _scan_to(self, number: RequestNumber) -> None:
        if self._parameters.refill_when == "mid_pass":
            self._scanned = self._key(number)

    def _begin_pass(self) -> None:
        self._scanned = None
        self._misfits.clear()
        if self._passed:
            for client in self._passed:
                self._place(client)
            self._passed.clear()

    def _tick(self, event: Tick) -> None:
        self._now_s = event.now_s
        self._begin_pass()
        if self._parameters.client_age_limit_s:
            for client in self._queued:
                self._place(client)
        self._idle.tick(event.now_s)

    # The index.

    def _key(self, number: RequestNumber) -> tuple[Any, ...]:
        """How a request stands among all that wait."""
        return longest_match(self._tree.match((number,)), (number,))

    def _is_past(self, key: tuple[Any, ...]) -> bool:
        """Whether this pass has no further look at the request that stands there."""
        if key[-1] in self._misfits:
            return True
        return self._scanned is not None and key <= self._scanned

    def _next_key(self, client: _Client) -> tuple[Any, ...] | None:
        """How the client's next request in this pass stands, whose number comes last."""
        limit_s = self._parameters.client_age_limit_s
        if limit_s:
            oldest = client.since.least()
            key = self._key(oldest)
            if self._now_s - client.since[oldest] > limit_s and not self._is_past(key):
                return key
        key = self._tree.first_key(client.name)
        if not self._is_past(key):
            return key
        self._passed[client] = None
        upcoming = islice(self._tree.ranks(client.name), 1, 1 + self._parameters.max_skips)
        keys = (self._key(rank[-1]) for rank in upcoming)
        return next((key for key in keys if not self._is_past(key)), None)

    def _place(self, client: _Client) -> None:
        """The client may stand elsewhere now."""
        self._moved[client] = None

    def _settle(self) -> None:
        """Bring the index up to date, once for all that happened since it was."""
        for name in self._tree.changed_lanes():
            if name in self._clients:
                self._moved[self._clients[name]] = None
        for client in self._moved:
            has_place = client.since and client.credit > client.held
            key = self._next_key(client) if has_place else None
            if key != client.key:
                if client.key is not None:
                    del self._ready[client.key]
                if key is not None:
                    self._ready.put(key, client)
                client.key = key
        self._moved.clear()
