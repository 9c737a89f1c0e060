"""What a KV pool holds, exactly: in bytes, pages and tokens. Knows no model: it is told the bytes
that a token takes in all layers (Delta in papers.md 1.3).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvMemory:
    """A pool of `num_pages` pages of `page_size` tokens of `bytes_per_token` bytes."""

    num_pages: int
    page_size: int
    bytes_per_token: int

    @classmethod
    def within(
        cls, free_bytes: int, fraction: float, *, page_size: int, bytes_per_token: int
    ) -> "KvMemory":
        """The largest pool within `fraction` of `free_bytes`; it may hold no page at all."""
        num_pages = int(free_bytes * fraction) // (page_size * bytes_per_token)
        return cls(num_pages, page_size, bytes_per_token)

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.bytes_per_token

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    def fits(self, rows: int, length: int, steps: int) -> bool:
        """Whether a batch of `rows` rows padded to `length` tokens can run `steps` steps, each row
        on pages of its own. Who does not fit fits with no more rows, tokens or steps either."""
        return rows * -(-(length + steps) // self.page_size) <= self.num_pages

    def fits_unpaged(self, rows: int, length: int, steps: int) -> bool:
        """The same for a device that packs tokens without pages, as SCLS's rule has it."""
        return rows * (length + steps) <= self.num_tokens
