"""What each client asked for and got, counted by the front end. Knows no transport, no policy."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from jaxserve.server.identity import Caller

MOST_CLIENTS: Final = 1000
"""Names that requests make up are not trusted to be few: further ones are counted as `OTHER`."""
OTHER: Final = "other"


@dataclass(slots=True)
class ClientCounts:
    """One client's requests and tokens since the start; tokens are counted as requests end."""

    client: str
    weight: float = 1.0
    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class ClientLedger:
    """Counts by client."""

    def __init__(self) -> None:
        self._counts: dict[str, ClientCounts] = {}

    def of(self, caller: Caller) -> ClientCounts:
        """The caller's counts, to be added to."""
        name = caller.client
        if name not in self._counts and len(self._counts) >= MOST_CLIENTS and not caller.trusted:
            name = OTHER
        counts = self._counts.setdefault(name, ClientCounts(name))
        counts.weight = caller.weight
        return counts

    def all(self) -> Iterable[ClientCounts]:
        return self._counts.values()
