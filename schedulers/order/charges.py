"""What each request is charged: prompt tokens by price, output tokens as they come, nothing twice.

Project rules, papers.md 3.3: a token that is computed again after a preemption is not charged
again, but on wish, and what was charged but never run is given back.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from ..events import Arrive, Ran, RequestNumber

Owner = TypeVar("Owner")

KNOWN_CLIENT_S: Final = 3600.0
"""A client that was away longer is a newcomer: names that requests make up must not add up."""
MOST_IDLE: Final = 1000
"""Clients without requests that are remembered; the longest idle is forgotten first.

That takes what credit it has, or forgives what it owes: no more than a new name would.
"""


@dataclass(frozen=True, slots=True)
class Prices:
    """Per token: computed prompt tokens, output tokens, and prompt tokens found cached as a share
    of `w_in`. With `at_enactment` prompt tokens are charged as they are run, else on admission.
    With `recharge` all that an admission computes is charged, whoever computed it before."""

    w_in: float
    w_out: float
    price_cached: float
    at_enactment: bool = False
    recharge: bool = False


class IdleClients:
    """Who is remembered without having requests, by name, longest idle first."""

    def __init__(self, forget: Callable[[str], object]):
        self._forget = forget
        self._since_s: dict[str, float] = {}
        self._oldest_s = math.inf  # nobody is idle for longer

    def add(self, client: str, now_s: float) -> None:
        """The client's last request is over. It may be one too many to remember."""
        if not self._since_s:
            self._oldest_s = now_s
        self._since_s[client] = now_s
        if len(self._since_s) > MOST_IDLE:
            self._drop_first()

    def discard(self, client: str) -> None:
        """The client has a request."""
        self._since_s.pop(client, None)

    def tick(self, now_s: float) -> None:
        """Forget who was away too long."""
        while now_s - self._oldest_s >= KNOWN_CLIENT_S:
            first_s = next(iter(self._since_s.values()), math.inf)
            if first_s == self._oldest_s:
                self._drop_first()
            else:
                self._oldest_s = first_s

    def _drop_first(self) -> None:
        client = next(iter(self._since_s))
        del self._since_s[client]
        self._forget(client)


Bill = tuple[float, float]
"""What a client's account changes by: charged now, and held because it is planned."""
NOTHING: Final[Bill] = (0.0, 0.0)


@dataclass(slots=True, kw_only=True)
class Prefill:
    """Prompt tokens of a request's present admission: it computes `extend`, the last `fresh` of
    which count; `ran` of them have been run."""

    extend: int = 0
    fresh: int = 0
    ran: int = 0

    @property
    def unrun(self) -> int:
        """Fresh tokens that have not been run."""
        return min(self.fresh, self.extend - self.ran)

    def begin(self, extend: int, known: int) -> None:
        """The request is let in; `known` of its tokens were computed before."""
        self.extend, self.fresh, self.ran = extend, max(0, extend - known), 0

    def run(self, num_tokens: int) -> int:
        """So many tokens were run: how many of them were fresh."""
        before = self.unrun
        self.ran += num_tokens
        return before - self.unrun

    def stop(self) -> int:
        """The request was preempted or ended: fresh tokens that will not be run."""
        unrun, self.fresh = self.unrun, 0
        return unrun


@dataclass(slots=True)
class _Account(Prefill):
    """Tokens of one request.

    `cached` is what was charged for tokens found cached. It is settled once anything has `begun`,
    that is, was run in an admission that is over.
    """

    num_prompt_tokens: int
    num_samples: int
    cached: float = 0.0
    begun: bool = False
    made: int = 0
    paid: int = 0


def num_known(paid: int, made: int, num_prompt_tokens: int, num_samples: int) -> int:
    """Tokens of an admission that somebody computed before.

    `paid` of the prompt were, once for all samples. Samples that have made tokens compute it each
    for itself when they are let in again.
    """
    if not made:
        return paid
    return num_samples * min(paid, num_prompt_tokens) + made


class Charges:
    """The accounts of all requests that were admitted, and the prompts of those that were not:
    what a slice touches stays together in memory."""

    def __init__(self, prices: Prices):
        self._prices = prices
        self._accounts: dict[RequestNumber, _Account] = {}
        self._prompts: dict[RequestNumber, tuple[int, int]] = {}

    def arrived(self, event: Arrive) -> None:
        self._prompts[event.number] = (event.num_prompt_tokens, event.num_samples)

    def admitted(self, number: RequestNumber, extend: int) -> Bill:
        """`extend` tokens are to be computed; the others are cached."""
        account, prices = self._accounts.get(number), self._prices
        charge = 0.0
        if account is None:
            account = self._accounts[number] = _Account(*self._prompts.pop(number))
        if not account.begun:
            num_cached = max(0, account.num_prompt_tokens - extend)
            charge = account.cached = prices.w_in * prices.price_cached * num_cached
        known = 0
        if not prices.recharge:
            known = num_known(
                account.paid, account.made, account.num_prompt_tokens, account.num_samples
            )
        account.begin(extend, known)
        if prices.at_enactment:
            return charge, prices.w_in * account.fresh
        account.paid += account.fresh
        return charge + prices.w_in * account.fresh, 0.0

    def enacted(
        self, ran: Iterable[Ran], owners: Mapping[RequestNumber, Owner]
    ) -> Mapping[Owner, Bill]:
        """Tokens were run: what that is for each owner of some of the requests."""
        accounts, prices = self._accounts, self._prices
        outputs: dict[Owner, int] = {}
        prompts: dict[Owner, int] = {}
        for number, num_prompt, num_output in ran:
            account = accounts[number]
            if num_output:
                account.made += num_output
                owner = owners[number]
                outputs[owner] = outputs.get(owner, 0) + num_output
            if num_prompt:
                fresh = account.run(num_prompt)
                if prices.at_enactment:
                    account.paid += fresh
                    owner = owners[number]
                    prompts[owner] = prompts.get(owner, 0) + fresh
        bills: dict[Owner, Bill] = {}
        for owner, made in outputs.items():
            bills[owner] = (prices.w_out * made, 0.0)
        for owner, fresh in prompts.items():
            charge = prices.w_in * fresh
            bills[owner] = (charge + bills.get(owner, NOTHING)[0], -charge)
        return bills

    def stopped(self, number: RequestNumber) -> Bill:
        """A running request was preempted or ended: what was not run is given back, and if nothing
        ever was, what was found cached."""
        account, prices = self._accounts[number], self._prices
        unrun = account.stop()
        account.begun = account.begun or account.ran > 0
        back = 0.0 if account.begun else account.cached
        if not unrun and not back:
            return NOTHING
        if prices.at_enactment:
            return -back, -prices.w_in * unrun
        account.paid -= unrun
        return -back - prices.w_in * unrun, 0.0

    def forget(self, number: RequestNumber) -> None:
        """The request is over."""
        if self._accounts.pop(number, None) is None:
            del self._prompts[number]
