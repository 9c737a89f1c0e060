"""How pages get from HBM into VMEM, ahead of the kernel that reads them.

Knows which pages each row of a batch needs and in what order; does not know what they are read for.

Dimension key: B rows  P pages per row  N pages in the pool  K kv heads  S slots per page
D lanes of a stored row  Z = 2S  T tokens per block of pages, R = T / S pages  F blocks in the ring

A row's needed tokens are cut into blocks of T, counted from its own first needed page. Blocks pass
through a ring of F buffers: while one is read, the copies of the F - 1 after it are under way,
across the ends of rows, so that many short rows do not each wait for memory. Rows without a block
are passed over. With several cores, core c has the rows c, c + cores, c + 2 cores and so on.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# What a core remembers from one row to the next, in scalar memory: the row and the block to fetch
# next, and the buffers to fill and to read next.
_ROW, _BLOCK, _FILL, _READ = range(4)
CURSOR: Final = 4


class Need(NamedTuple):
    """What is fetched for a row: what `num_queries` queries from its start on see in a window."""

    num_rows: int
    table_width: int
    num_pages: int
    page_size: int
    block: int
    ring: int
    cores: int
    num_queries: int
    window: int | None


class PageRing(NamedTuple):
    """The ring, as a kernel's references: scalars, the pool in HBM, the buffers, the bookkeeping.

    `pool_NKZ` and `scale_FRKZ` are None for pages without scales.
    """

    need: Need
    table_BP: Any
    len_B: Any
    start_B: Any
    pool_NKSD: Any
    pool_NKZ: Any
    block_FKTD: Any
    scale_FRKZ: Any
    cursor: Any
    copied_F: Any

    def open(self, core: Any) -> None:
        """Start all copies that the ring holds, of the first blocks of a core's rows."""
        self.cursor[_ROW] = self._row_with_blocks(core)
        for at in (_BLOCK, _FILL, _READ):
            self.cursor[at] = 0
        for _ in range(self.need.ring - 1):
            self._fetch()

    def take(self, b: Any, j: Any) -> Any:
        """Return the buffer that holds row b's block j; rows and blocks must be taken in order.

        What was taken before is given up for it: its buffer is refilled.
        """
        self._fetch()
        buffer = self.cursor[_READ]
        self.cursor[_READ] = self._after(buffer)
        self._copy(b, j, buffer, lambda copy: copy.wait())
        return buffer

    def length(self, b: Any) -> Any:
        """Row b's length, as far as its table goes."""
        return jnp.minimum(self.len_B[b], self.need.table_width * self.need.page_size)

    def num_blocks(self, b: Any) -> Any:
        first, end = self._pages(b)
        return pl.cdiv(jnp.maximum(end - first, 0), self.need.block // self.need.page_size)

    def position(self, b: Any, j: Any) -> Any:
        """The position in row b of its block j's first token."""
        return self._pages(b)[0] * self.need.page_size + j * self.need.block

    def _pages(self, b: Any) -> tuple[Any, Any]:
        """The pages of row b with a token that is needed: the first, and the one after the last."""
        end = jnp.minimum(self.length(b), self.start_B[b] + self.need.num_queries)
        end_page = pl.cdiv(end, self.need.page_size)
        if self.need.window is None:
            return 0, end_page
        first = jnp.minimum(self.start_B[b], self.length(b) - 1) + 1 - self.need.window
        return jnp.maximum(first, 0) // self.need.page_size, end_page

    def _row_with_blocks(self, b: Any) -> Any:
        """The first row from b on, of this core's, with anything to fetch; past the end if none."""
        B, cores = self.need.num_rows, self.need.cores

        def num_blocks(b: Any) -> Any:
            return self.num_blocks(jnp.minimum(b, B - 1))

        def onward(at: tuple[Any, Any]) -> tuple[Any, Any]:
            return at[0] + cores, num_blocks(at[0] + cores)

        return lax.while_loop(lambda at: (at[0] < B) & (at[1] == 0), onward, (b, num_blocks(b)))[0]

    def _fetch(self) -> None:
        """Start the copies of the next block, if any is left."""
        b, j, buffer = (self.cursor[at] for at in (_ROW, _BLOCK, _FILL))

        @pl.when(b < self.need.num_rows)
        def _():
            self._copy(b, j, buffer, lambda copy: copy.start())
            more = j + 1 < self.num_blocks(b)
            self.cursor[_ROW] = jnp.where(more, b, self._row_with_blocks(b + self.need.cores))
            self.cursor[_BLOCK] = jnp.where(more, j + 1, 0)
            self.cursor[_FILL] = self._after(buffer)

    def _after(self, buffer: Any) -> Any:
        return jnp.where(buffer + 1 < self.need.ring, buffer + 1, 0)

    def _copy(self, b: Any, j: Any, buffer: Any, act: Callable[[Any], Any]) -> None:
        """Start or await the copies of a block: a page with all its heads at a time."""
        S, R = self.need.page_size, self.need.block // self.need.page_size
        first, end = self._pages(b)
        first += j * R

        def one(i: Any, _: None) -> None:
            # Clamped: nothing outside the pool is read, whatever the table says.
            page = self.table_BP[b * self.need.table_width + first + i]
            page = jnp.clip(page, 0, self.need.num_pages - 1)
            slots = pl.ds(pl.multiple_of(i * S, S), S)
            done = self.copied_F.at[buffer]
            block_KSD = self.block_FKTD.at[buffer, :, slots]
            act(pltpu.make_async_copy(self.pool_NKSD.at[page], block_KSD, done))
            if self.pool_NKZ is not None:
                scale_KZ = self.scale_FRKZ.at[buffer, i]
                act(pltpu.make_async_copy(self.pool_NKZ.at[page], scale_KZ, done))

        lax.fori_loop(0, jnp.minimum(end - first, R), one, None)
