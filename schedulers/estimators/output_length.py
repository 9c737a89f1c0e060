"""How many tokens a request will have made at its end, judged by requests that ended.

Deterministic: quantiles, no draws. Knows no pages and no rows: admission rules ask it.
"""

import bisect
import math
from collections import OrderedDict, deque
from typing import Final, Protocol, runtime_checkable

MOST_CLIENTS: Final = 1000
"""Clients with a history of their own; the one heard of longest ago is forgotten first."""


@runtime_checkable
class OutputLength(Protocol):
    """One estimator."""

    def expected(self, client: str, made: int, most: int) -> int:
        """Output tokens at its end of a request that has made `made` of at most `most` tokens."""
        ...

    def finished(self, client: str, num_tokens: int) -> None:
        """A request ended by itself after so many output tokens."""
        ...


class Constant:
    """Everybody makes `tokens`; who has made them makes all that it may. 0: so does everybody."""

    def __init__(self, tokens: int):
        self._tokens = tokens

    def expected(self, client: str, made: int, most: int) -> int:
        return min(self._tokens, most) if made < self._tokens else most

    def finished(self, client: str, num_tokens: int) -> None:
        pass


class _Window:
    """The last outputs, in the order of their ends and by length."""

    def __init__(self, most: int):
        self._most = most
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, num_tokens: int) -> None:
        if len(self._recent) == self._most:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(num_tokens)
        bisect.insort(self._sorted, num_tokens)

    def quantile(self, made: int, u: float) -> int | None:
        """The least output that a share `u` of those beyond `made` tokens do not exceed."""
        first = bisect.bisect_right(self._sorted, made)
        beyond = len(self._sorted) - first
        if not beyond:
            return None
        return self._sorted[first + max(0, math.ceil(u * beyond) - 1)]


class ClientHistory:
    """Quantile `u` of the client's last `hist` outputs that were longer than what it has made.

    While a client has fewer than `min_samples` outputs, and for a request that outlasts them all,
    those of all clients stand in; where they know nothing either, `otherwise` does.
    """

    def __init__(self, *, hist: int, u: float, min_samples: int, otherwise: OutputLength):
        self._hist, self._u, self._min_samples = hist, u, min_samples
        self._otherwise = otherwise
        self._all = _Window(hist)
        self._clients: OrderedDict[str, _Window] = OrderedDict()

    def expected(self, client: str, made: int, most: int) -> int:
        own = self._clients.get(client)
        tokens = None
        if own is not None and len(own) >= self._min_samples:
            tokens = own.quantile(made, self._u)
        if tokens is None:
            tokens = self._all.quantile(made, self._u)
        if tokens is None:
            return self._otherwise.expected(client, made, most)
        return min(tokens, most)

    def finished(self, client: str, num_tokens: int) -> None:
        self._all.add(num_tokens)
        own = self._clients.pop(client, None)
        if own is None:
            own = _Window(self._hist)
            if len(self._clients) == MOST_CLIENTS:
                self._clients.popitem(last=False)
        self._clients[client] = own
        own.add(num_tokens)
