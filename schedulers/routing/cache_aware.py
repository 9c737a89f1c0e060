"""Cache aware: the longest match if it is long enough and loads are balanced, else the least load.

Source: lightseekorg/smg. One tree serves both of its ways to match here: it hears of what is sent
and of the replicas' events. Of a replica that is gone nothing is known any more, so that the next
longest match counts, where the source takes the first healthy replica.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..parameters import not_negative, require
from .base import Choice, PrefixRouting, Routable
from .views import Views


@dataclass(frozen=True, slots=True)
class CacheAwareParameters:
    """Loads are out of balance when the largest exceeds the smallest by more than `balance_abs`
    requests and `balance_rel` times; also when a KV use exceeds `overload`, or two differ by more
    than `spread` (both off at 1). `match`: a match counts if it is more than `threshold` of the
    prompt, or if it is there at all. `tree_pages`: most pages of the global tree."""

    threshold: float = 0.3
    balance_abs: float = 64.0
    balance_rel: float = 1.5
    overload: float = 1.0
    spread: float = 1.0
    match: Literal["ratio", "overlap"] = "ratio"
    tree_pages: int = 262144

    def __post_init__(self) -> None:
        require(0 <= self.threshold <= 1, "threshold", self.threshold, "0 to 1")
        not_negative("balance_abs", self.balance_abs)
        not_negative("balance_rel", self.balance_rel)
        for name in ("overload", "spread"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "0 to 1 (off)")
        require(self.tree_pages > 0, "tree_pages", self.tree_pages, "1 or more")


class CacheAware(PrefixRouting):
    """Of replicas with the longest match the least loaded, then the one with fewer pages believed
    cached; where no match counts, the least loaded, then the one that was sent the fewest."""

    def __init__(self, parameters: CacheAwareParameters, *, num_replicas: int, page_size: int):
        super().__init__(num_replicas, page_size=page_size, tree_pages=parameters.tree_pages)
        self._parameters = parameters

    def choose(self, request: Routable, views: Views) -> Choice:
        matched = self.matched(request)
        replica = self._matching(request, views, matched)
        if replica is None:
            replica = _first(views.candidates, views.outstanding, views.dispatched)
        return Choice(replica, int(matched[replica]))

    def _matching(self, request: Routable, views: Views, matched: np.ndarray) -> int | None:
        """The replica whose match counts."""
        known, candidates = self._parameters, views.candidates
        longest = int(matched[candidates].max())
        least = 0.0 if known.match == "overlap" else known.threshold * request.num_prompt_tokens
        if longest <= least or self._out_of_balance(views):
            return None
        holders = candidates[matched[candidates] == longest]
        return _first(holders, views.outstanding, self.tree.num_pages)

    def _out_of_balance(self, views: Views) -> bool:
        known = self._parameters
        loads = views.outstanding[views.candidates]
        most, least = int(loads.max()), int(loads.min())
        if most - least > known.balance_abs and most > known.balance_rel * least:
            return True
        use = views.kv_use[views.candidates]
        return bool(use.max() > known.overload or use.max() - use.min() > known.spread)


def _first(among: np.ndarray, *columns: np.ndarray) -> int:
    """The index of `among` that is least in the first column, of equals in the next."""
    for column in columns:
        values = column[among]
        among = among[values == values.min()]
        if len(among) == 1:
            break
    return int(among[0])
