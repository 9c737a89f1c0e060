"""The most pages that rows will hold at once, kept as rows join. Knows no rule and no pool.

When the row with the k-th longest remaining output ends, the first k are alive and each has grown
by that much (ModelTC/lightllm; papers.md 2.6). In pages: at the end of row i
    sum over rows j with remaining_j >= remaining_i of ceil((held_j + remaining_i) / page size)
and the peak is the largest of these. A row that joins adds to the sums of the rows that end no
later than itself and brings a sum of its own: no sorting, O(rows) for each that joins.
"""

from collections.abc import Sequence

import numpy as np


class PeakMemory:
    """Rows that run in step until each has made its remaining tokens."""

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._held = np.zeros(0, np.int32)
        self._remaining = np.zeros(0, np.int32)
        self._at_end = np.zeros(0, np.int64)  # pages held when each row ends

    def join(self, held: Sequence[int], remaining: Sequence[int]) -> None:
        """Rows join: tokens that each holds, and tokens that it will still make."""
        new_held, new_remaining = np.array(held, np.int32), np.array(remaining, np.int32)
        old = self._at_end + self._pages(self._remaining, new_held, new_remaining)
        self._held = np.concatenate([self._held, new_held])
        self._remaining = np.concatenate([self._remaining, new_remaining])
        new = self._pages(new_remaining, self._held, self._remaining)
        self._at_end = np.concatenate([old, new])

    def pages(self) -> int:
        """The peak of the rows that joined."""
        return int(self._at_end.max(initial=0))

    def pages_with(self, held: int, remaining: int, copies: int) -> int:
        """The peak if `copies` more rows joined that hold and will make so many tokens."""
        ends, up = self._remaining, self._page_size - 1
        own = (ends <= remaining) * ((ends + (held + up)) // self._page_size)
        others = (ends >= remaining) * ((self._held + (remaining + up)) // self._page_size)
        at_own_end = int(others.sum()) + copies * ((held + remaining + up) // self._page_size)
        return max(int((self._at_end + copies * own).max(initial=0)), at_own_end)

    def _pages(self, steps: np.ndarray, held: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        """Pages that rows [n] hold after `steps` [k] steps, those that ended not counted: [k]."""
        pages = held[None, :] + (steps[:, None] + (self._page_size - 1))
        pages //= self._page_size  # in place: this is most of what admission costs
        pages *= remaining[None, :] >= steps[:, None]
        return pages.sum(axis=1, dtype=np.int64)
