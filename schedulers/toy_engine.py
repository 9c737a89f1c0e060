"""An engine small enough to follow by hand, for tests of orders: slots, a prefix cache, one token a
step. Pages have names, so that a test can say what prompts share."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from .events import Abort, Admit, Arrive, Enact, Finish, Misfit, Preempt, Ran, Tick
from .order import Order, Refuses
from .prefix_tree import NO_PARENT, Removed, Stored

PAGE: Final = 4
"""Tokens of a page."""


@dataclass
class Work:
    """A request: its client, the pages of its prompt by name, and how many tokens it makes.

    `keys` follow from the pages. Of what it made, `told` tokens are known to the order. `paid` are
    the places in prompt and output for which its client was charged.
    """

    number: int
    client: str
    pages: tuple[str, ...]
    output: int
    weight: float = 1.0
    priority: int = 0
    deadline_s: float | None = None
    service_s: float = 0.0
    made: int = 0
    told: int = 0
    paid: set[int] = field(default_factory=set)

    keys: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        ways = ("/".join(self.pages[: end + 1]) for end in range(len(self.pages)))
        self.keys = tuple(way.encode() for way in ways)

    @property
    def num_prompt_tokens(self) -> int:
        return PAGE * len(self.pages) + 1

    @property
    def most_tokens(self) -> int:
        return self.num_prompt_tokens + self.output


@dataclass
class ToyEngine:
    """Lets in whom `order` names while slots are free, then runs one token of everybody.

    A prompt is computed at once, and cached at the end of the pass that let it in. Who runs keeps
    room for all its tokens out of `room`, if that is not 0; a tick tells what share is free. A
    step's tokens are told `lag` steps later, and who has made its last is running until then.

    `admitted` and `refused` name all there were, `misfits` those of the last pass.
    `charged` sums what clients were served, in the moment of it: `w_in` a prompt token that was
    computed, `w_out` a token made, `price_cached` times `w_in` a prompt token that the request
    found cached when it was first let in. A token that is computed again is charged again only with
    `recharge`.
    """

    order: Order
    slots: int
    room: int = 0
    lag: int = 0
    w_in: float = 1.0
    w_out: float = 2.0
    price_cached: float = 0.0
    recharge: bool = False
    cached: set[bytes] = field(default_factory=set)
    waiting: dict[int, Work] = field(default_factory=dict)
    running: dict[int, Work] = field(default_factory=dict)
    charged: dict[str, float] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    misfits: list[int] = field(default_factory=list)
    in_flight: deque[list[Ran]] = field(default_factory=deque)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self._refuses = self.order.refuses if isinstance(self.order, Refuses) else None

    def arrive(self, work: Work) -> None:
        event = Arrive(
            number=work.number,
            client=work.client,
            priority=work.priority,
            arrived_s=self.now_s,
            num_prompt_tokens=work.num_prompt_tokens,
            max_output=work.output,
            num_samples=1,
            weight=work.weight,
            page_keys=work.keys,
            num_cached=self.match(work),
            deadline_s=work.deadline_s,
            service_s=work.service_s,
        )
        if self._refuses and self._refuses(event) is not None:
            self.refused.append(work.number)
            return
        self.waiting[work.number] = work
        self.charged.setdefault(work.client, 0.0)
        self.order.on(event)

    def match(self, work: Work) -> int:
        return sum(key in self.cached for key in work.keys)

    def fits(self, work: Work) -> bool:
        """Whether there is a slot and room for it now."""
        if len(self.running) >= self.slots:
            return False
        if not self.room or not self.running:
            return True
        return self._held + work.most_tokens <= self.room

    @property
    def _held(self) -> int:
        return sum(work.most_tokens for work in self.running.values())

    def fill(self) -> list[int]:
        """One pass: let in as many as fit; their numbers."""
        self.now_s += 1.0
        free_share = max(0.0, 1.0 - self._held / self.room) if self.room else 1.0
        self.order.on(Tick(self.now_s, free_share))
        before, self.misfits = len(self.admitted), []
        while len(self.running) < self.slots:
            number = self.order.next()
            if number is None or number in self.misfits[-1:]:
                break
            if self.fits(self.waiting[number]):
                self._let_in(number)
            else:
                self.misfits.append(number)
                self.order.on(Misfit(number))
        new = self.admitted[before:]
        self._cache(new)
        return new

    def admit(self, number: int) -> None:
        """Let in a request whom nobody named."""
        self._let_in(number)
        self._cache([number])

    def _let_in(self, number: int) -> None:
        work = self.waiting.pop(number)
        num_tokens, known = work.num_prompt_tokens + work.made, PAGE * self.match(work)
        computed = set(range(known, num_tokens))
        if not work.paid:
            self.charged[work.client] += self.w_in * self.price_cached * known
        fresh = computed if self.recharge else computed - work.paid
        self.charged[work.client] += self.w_in * len(fresh)
        work.paid |= computed
        self.running[number] = work
        self.admitted.append(number)
        self.order.on(Admit(number, len(computed)))
        self.order.on(Enact([(number, len(computed), 0)]))

    def _cache(self, numbers: list[int]) -> None:
        for number in numbers:
            work = self.running[number]
            known = self.match(work)
            if known < len(work.keys):
                parent = work.keys[known - 1] if known else NO_PARENT
                self.cached.update(work.keys)
                self.order.on(Stored(1, parent, work.keys[known:]))

    def step(self) -> None:
        """One token for everybody who runs and has not made its last."""
        ran = [(number, 0, 1) for number, work in self.running.items() if work.made < work.output]
        for number, _, _ in ran:
            work = self.running[number]
            work.paid.add(work.num_prompt_tokens + work.made)
            work.made += 1
            self.charged[work.client] += self.w_out
        self.in_flight.append(ran)
        if len(self.in_flight) > self.lag:
            self._tell()

    def _tell(self) -> None:
        """The oldest step in flight has come back."""
        ran = [entry for entry in self.in_flight.popleft() if entry[0] in self.running]
        self.order.on(Enact(ran))
        for number, _, num_output in ran:
            work = self.running[number]
            work.told += num_output
            if work.told == work.output:
                del self.running[number]
                self.order.on(Finish(number))

    def preempt(self) -> None:
        """The last in the order gives way, once all that runs has come back."""
        while self.in_flight:
            self._tell()
        if self.running:
            number = self.order.running()[-1]
            work = self.waiting[number] = self.running.pop(number)
            self.order.on(Preempt(number, self.match(work)))

    def abort(self, number: int) -> None:
        """End a request from outside. What it made and nobody was told of was never charged."""
        work = self.waiting.pop(number, None) or self.running.pop(number)
        self.charged[work.client] -= self.w_out * (work.made - work.told)
        self.order.on(Abort(number))

    def evict(self, key: bytes) -> None:
        """Forget a page and all behind it."""
        gone = [other for other in self.cached if other == key or other.startswith(key + b"/")]
        gone.sort(key=len, reverse=True)
        self.cached.difference_update(gone)
        self.order.on(Removed(1, tuple(gone)))
