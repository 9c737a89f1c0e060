"""An engine small enough to follow by hand, for tests of orders: slots, a prefix cache, one token a
step. Pages have names, so that a test can say what prompts share."""

from dataclasses import dataclass, field
from typing import Final

from .events import Abort, Admit, Arrive, Enact, Finish, Preempt, Tick
from .order import Order
from .prefix_tree import NO_PARENT, Removed, Stored

PAGE: Final = 4
"""Tokens of a page."""


@dataclass
class Work:
    """A request: its client, the pages of its prompt by name, and how many tokens it makes."""

    number: int
    client: str
    pages: tuple[str, ...]
    output: int
    weight: float = 1.0
    priority: int = 0
    made: int = 0

    @property
    def keys(self) -> tuple[bytes, ...]:
        return tuple("/".join(self.pages[: end + 1]).encode() for end in range(len(self.pages)))

    @property
    def num_prompt_tokens(self) -> int:
        return PAGE * len(self.pages) + 1


@dataclass
class ToyEngine:
    """Lets in whom `order` names while slots are free, then runs one token of everybody.

    A prompt is computed and cached when it is let in. `charged` sums what clients were served:
    `w_in` a computed prompt token, `w_out` a token made.
    """

    order: Order
    slots: int
    w_in: float = 1.0
    w_out: float = 2.0
    cached: set[bytes] = field(default_factory=set)
    waiting: dict[int, Work] = field(default_factory=dict)
    running: dict[int, Work] = field(default_factory=dict)
    charged: dict[str, float] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    now_s: float = 0.0

    def arrive(self, work: Work) -> None:
        self.waiting[work.number] = work
        self.charged.setdefault(work.client, 0.0)
        self.order.on(
            Arrive(
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
            )
        )

    def match(self, work: Work) -> int:
        return sum(key in self.cached for key in work.keys)

    def fill(self, most: int | None = None) -> list[int]:
        """Let in as many as there are slots, or `most`; their numbers."""
        self.now_s += 1.0
        self.order.on(Tick(self.now_s))
        before = len(self.admitted)
        while len(self.running) < self.slots and (
            most is None or len(self.admitted) < before + most
        ):
            number = self.order.next()
            if number is None:
                break
            self.admit(number)
        return self.admitted[before:]

    def admit(self, number: int) -> None:
        work = self.waiting.pop(number)
        known = self.match(work)
        extend = work.num_prompt_tokens + work.made - PAGE * known
        self.order.on(Admit(number, extend))
        self.order.on(Enact([(number, extend, 0)]))
        self.charged[work.client] += self.w_in * max(0, extend - work.made)
        self.running[number] = work
        self.admitted.append(number)
        if known < len(work.keys):
            parent = work.keys[known - 1] if known else NO_PARENT
            self.cached.update(work.keys)
            self.order.on(Stored(1, parent, work.keys[known:]))

    def step(self) -> None:
        """One token for everybody who runs."""
        self.order.on(Enact([(number, 0, 1) for number in self.running]))
        for number, work in list(self.running.items()):
            work.made += 1
            self.charged[work.client] += self.w_out
            if work.made >= work.output:
                del self.running[number]
                self.order.on(Finish(number))

    def preempt(self) -> None:
        """The last in the order gives way."""
        number = self.order.running()[-1]
        work = self.waiting[number] = self.running.pop(number)
        self.order.on(Preempt(number, self.match(work)))

    def abort(self, number: int) -> None:
        """End a request from outside."""
        self.waiting.pop(number, None)
        self.running.pop(number, None)
        self.order.on(Abort(number))

    def evict(self, key: bytes) -> None:
        """Forget a page and all behind it."""
        gone = [other for other in self.cached if other == key or other.startswith(key + b"/")]
        gone.sort(key=len, reverse=True)
        self.cached.difference_update(gone)
        self.order.on(Removed(1, tuple(gone)))
