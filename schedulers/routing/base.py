"""What every routing policy offers, and the records that it deals in.

A policy is a deterministic state machine over what it is told: no clock (`Views.now_s` says when),
no transport, and no luck but from a seed among its parameters.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..events import CacheChange
from .global_tree import GlobalTree
from .views import Views


@dataclass(slots=True, kw_only=True)
class Routable:
    """A request, as far as it matters where it goes. Never changed once made; not frozen, which
    takes three times as long.

    `page_keys` name the pages that its prompt could find cached (`prefix_tree.page_keys`).
    `session` names the conversation that it belongs to. `weight` is its client's share.
    """

    number: int
    client: str
    num_prompt_tokens: int
    page_keys: tuple[bytes, ...] = ()
    session: str | None = None
    weight: float = 1.0


class Choice(NamedTuple):
    """Where a request goes, and how many of its prompt tokens are believed to be cached there."""

    replica: int
    num_cached_tokens: int = 0


@dataclass(slots=True)
class Dispatch:
    """A request that was sent: the `number`th to that replica, counted from 1. Never changed."""

    request: Routable
    replica: int
    number: int
    num_cached_tokens: int

    @property
    def num_extend_tokens(self) -> int:
        """Prompt tokens that have to be computed, as believed."""
        return self.request.num_prompt_tokens - self.num_cached_tokens


@runtime_checkable
class Routing(Protocol):
    """Says which replica serves a request. Policies override what they care for."""

    @abstractmethod
    def choose(self, request: Routable, views: Views) -> Choice:
        """The replica for a request that is about to be sent; one of `views.candidates`, of which
        there is at least one. What it gives out for the choice, such as credit, it may keep."""

    def sent(self, dispatch: Dispatch) -> None:
        """What was just chosen was sent."""

    def ended(self, dispatch: Dispatch, num_output_tokens: int) -> None:
        """A request that was sent is over, in whatever way; it made so many tokens there."""

    def cache_changed(self, replica: int, event: CacheChange, seen: int) -> None:
        """The replica's prefix cache changed, when it had received `seen` dispatches."""

    def lost(self, replica: int, dispatches: Sequence[Dispatch]) -> None:
        """The replica is gone, with the requests that were there: they do not end."""

    def joined(self, replica: int) -> None:
        """A fresh replica, in a place that was lost, or in a new one behind the last."""

    def returned(self, replica: int) -> None:
        """The replica was no candidate for a while, and is one again, as it was."""


class PrefixRouting(Routing):
    """A policy that asks which replicas hold a prompt's prefix."""

    def __init__(self, num_replicas: int, *, page_size: int, tree_pages: int):
        self._page_size = page_size
        self.tree = GlobalTree(num_replicas, max_pages=tree_pages)

    def matched(self, request: Routable) -> np.ndarray:
        """Prompt tokens believed to be cached, by replica, [R] int64. The last token of a prompt is
        computed whatever is cached."""
        tokens = self.tree.matched(request.page_keys)
        tokens *= self._page_size
        return np.minimum(tokens, max(0, request.num_prompt_tokens - 1), out=tokens)

    def sent(self, dispatch: Dispatch) -> None:
        self.tree.sent(dispatch.replica, dispatch.request.page_keys, dispatch.number)

    def cache_changed(self, replica: int, event: CacheChange, seen: int) -> None:
        self.tree.changed(replica, event, seen)

    def lost(self, replica: int, dispatches: Sequence[Dispatch]) -> None:
        self.tree.lost(replica)

    def joined(self, replica: int) -> None:
        self.tree.joined(replica)
