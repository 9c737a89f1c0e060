"""Which static batches fit an instance's KV memory: SCLS's rule, in tokens or in pages.

Published: a batch's memory has a bound that is known before it runs. Reconstruction: the form
`rows * (length + steps) <= zeta * memory` and zeta (papers.md 1.3). Knows no time.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..estimators.memory import KvMemory

Unit = Literal["tokens", "pages"]


@dataclass(frozen=True, slots=True)
class MemoryRule:
    """`unit` pages counts each row in whole pages, tokens packs them; `most_rows` caps a batch.

    Who does not fit fits with no more rows, tokens or steps either: the batching relies on it.
    """

    memory: KvMemory
    unit: Unit
    most_rows: int

    @classmethod
    def share(cls, memory: KvMemory, zeta: float, unit: Unit, most_rows: int) -> "MemoryRule":
        """The rule over a share `zeta` of `memory`."""
        return cls(replace(memory, num_pages=int(zeta * memory.num_pages)), unit, most_rows)

    def fits(self, rows: int, length: int, steps: int) -> bool:
        """Whether so many rows padded to `length` tokens can run so many steps."""
        fits = self.memory.fits if self.unit == "pages" else self.memory.fits_unpaged
        return rows <= self.most_rows and fits(rows, length, steps)

    def rows(self, lengths: np.ndarray, steps: int) -> np.ndarray:
        """The most rows [n] that fit when the longest has `lengths` [n] tokens; 0: none."""
        tokens = lengths + steps
        if self.unit == "pages":
            rows = self.memory.num_pages // -(-tokens // self.memory.page_size)
        else:
            rows = self.memory.num_tokens // tokens
        return np.minimum(rows, self.most_rows)
