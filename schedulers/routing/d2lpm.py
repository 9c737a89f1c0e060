"""D2LPM's router: the longest match among the replicas on which the client has credit.

Source: "Locality-aware Fair Scheduling in LLM Serving" (arXiv 2501.14312), by a re-implementation;
papers.md 3.4. What a dispatch is charged and the quantum are reconstruction; that clients are
forgotten, and that a replica which was away comes back with a quantum at most, are project rules.
Replicas run `dlpm`, with credits of their own.

Bounds (derived, papers.md 3.6), with U = w_in * longest prompt + w_out * most requests of a client
in flight on a replica * longest output, while all replicas are candidates: credits stay in
[-U, worker_quantum], and what one client is charged on two replicas differs by at most
worker_quantum + U from the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..order.charges import IdleClients
from ..parameters import price, require
from .base import Choice, Dispatch, PrefixRouting, Routable
from .global_tree import FEW, bits
from .views import Views


@dataclass(frozen=True, slots=True)
class D2lpmParameters:
    """`worker_quantum` is what a refill gives a client on each replica, in priced tokens.
    `router_charge`: a dispatch costs the full prompt, or what is not believed to be cached there.
    `w_in` and `w_out` price prompt and output tokens. `new_replica_credit`: a replica that joins
    starts with nothing, and gets no request until clients have used up what they have elsewhere, or
    with a quantum of each client. `tree_pages`: most pages of the global tree.
    """

    worker_quantum: float = 100_000.0
    router_charge: Literal["full", "extend"] = "full"
    w_in: float = 1.0
    w_out: float = 2.0
    new_replica_credit: Literal["0", "quantum"] = "0"
    tree_pages: int = 262144

    def __post_init__(self) -> None:
        allowed = "a positive number, from 0.001 to 1e12"
        require(1e-3 <= self.worker_quantum <= 1e12, "worker_quantum", self.worker_quantum, allowed)
        price("w_in", self.w_in)
        price("w_out", self.w_out)
        require(self.tree_pages > 0, "tree_pages", self.tree_pages, "1 or more")


class D2lpm(PrefixRouting):
    """Shortest queue among the longest matches with credit; if none of these has credit, among all
    with credit. When none has, all get as few quanta as give one of them credit."""

    def __init__(self, parameters: D2lpmParameters, *, num_replicas: int, page_size: int):
        super().__init__(num_replicas, page_size=page_size, tree_pages=parameters.tree_pages)
        self._parameters = parameters
        self._rows: dict[str, int] = {}  # of clients, in the table of credits
        self._free_rows = [0]
        self._credits = np.zeros((1, num_replicas))
        self._num_live: dict[str, int] = {}  # requests of clients that have any
        self._idle = IdleClients(self._forget)
        self._now_s = 0.0

    def choose(self, request: Routable, views: Views) -> Choice:
        self._now_s = views.now_s
        self._idle.tick(views.now_s)
        row = self._row(request.client)  # which may make the table larger
        credits, candidates = self._credits[row], views.candidates
        holders, pages = self.tree.longest(request.page_keys, views.candidate_bits)
        # What is mostly so goes without a look at all replicas. (A prompt's last token is computed
        # anyway: where pages are of one token, holding the last page is not a longer match.)
        if pages and self._page_size > 1 and holders.bit_count() <= FEW:
            rich = [replica for replica in bits(holders) if credits[replica] > 0]
            if rich:
                tokens = min(pages * self._page_size, request.num_prompt_tokens - 1)
                return Choice(min(rich, key=views.outstanding.__getitem__), tokens)
        self._refill(credits, candidates)
        matched = self.matched(request)
        found, funded = _at(candidates, matched), _at(candidates, credits) > 0
        among = candidates[funded & (found == _largest(found))]
        if not len(among):
            among = candidates[funded]
        replica = int(among[views.outstanding[among].argmin()])
        return Choice(replica, int(matched[replica]))

    def credits(self, client: str) -> np.ndarray:
        """The client's credit on each replica, [R] float; a newcomer's is 0."""
        row = self._rows.get(client)
        return np.zeros(self._credits.shape[1]) if row is None else self._credits[row].copy()

    def _refill(self, credits: np.ndarray, candidates: np.ndarray) -> None:
        """Who is no candidate gets as much: refills count for all."""
        quantum = self._parameters.worker_quantum
        # A debt of many rounds may round to no credit: what is left is exact the second time.
        while (most := _largest(_at(candidates, credits))) <= 0:
            credits += (np.floor(-most / quantum) + 1) * quantum

    def sent(self, dispatch: Dispatch) -> None:
        super().sent(dispatch)
        known, request = self._parameters, dispatch.request
        full = known.router_charge == "full"
        tokens = request.num_prompt_tokens if full else dispatch.num_extend_tokens
        self._credits[self._rows[request.client], dispatch.replica] -= known.w_in * tokens
        self._idle.discard(request.client)
        self._num_live[request.client] = self._num_live.get(request.client, 0) + 1

    def ended(self, dispatch: Dispatch, num_output_tokens: int) -> None:
        client = dispatch.request.client
        cost = self._parameters.w_out * num_output_tokens
        self._credits[self._rows[client], dispatch.replica] -= cost
        self._leave(client)

    def lost(self, replica: int, dispatches: Sequence[Dispatch]) -> None:
        super().lost(replica, dispatches)
        for dispatch in dispatches:
            self._leave(dispatch.request.client)

    def _leave(self, client: str) -> None:
        self._num_live[client] -= 1
        if not self._num_live[client]:
            del self._num_live[client]
            self._idle.add(client, self._now_s)

    def joined(self, replica: int) -> None:
        super().joined(replica)
        if replica == self._credits.shape[1]:
            self._credits = np.append(self._credits, np.zeros((len(self._credits), 1)), axis=1)
        known = self._parameters
        self._credits[:, replica] = known.worker_quantum if known.new_replica_credit != "0" else 0.0

    def returned(self, replica: int) -> None:
        # All refills while it was away would bring it everybody at once.
        column = self._credits[:, replica]
        np.minimum(column, self._parameters.worker_quantum, out=column)

    def _row(self, client: str) -> int:
        row = self._rows.get(client)
        if row is not None:
            return row
        if not self._free_rows:
            num_rows = len(self._credits)
            self._free_rows = list(range(num_rows, 2 * num_rows))
            self._credits = np.append(self._credits, np.zeros_like(self._credits), axis=0)
        row = self._rows[client] = self._free_rows.pop()
        self._credits[row] = 0.0
        return row

    def _forget(self, client: str) -> None:
        self._free_rows.append(self._rows.pop(client))


def _at(candidates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values[candidates]`, which are mostly all."""
    return values if len(candidates) == len(values) else values[candidates]


def _largest(values: np.ndarray) -> Any:
    """As `max`, which takes three times as long: a part of it is written in Python."""
    return values[values.argmax()]
