"""The one door between host and device: slice plans become one packed int32 buffer and back.

Layout of the buffer, in order, for a bucket of B rows, NT prompt tiles of Q tokens and page tables
of P pages (float32 values travel as their bits):
    header        [HEADER]       steps, quorum, extras wanted, log-probabilities wanted
    rows          [B, FIELDS]    one `ROW_FIELDS` record each
    stop ids      [B, MAX_STOP]  padded with -1
    page tables   [B, P]
    tiles         [NT, 3]        batch row, first position, valid tokens
    prompt tokens [NT, Q]
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan
from jaxserve.request import MAX_STOP_TOKEN_IDS

HEADER: Final = 4
MAX_STOP: Final = MAX_STOP_TOKEN_IDS
INT_FIELDS: Final = (
    "slot",
    "kind",
    "steps",
    "cover",
    "sample_from",
    "length",
    "prompt_length",
    "max_length",
    "min_tokens",
    "top_k",
    "seed",
    "ignore_eos",
)
FLOAT_FIELDS: Final = (
    "temperature",
    "top_p",
    "min_p",
    "repetition",
    "presence",
    "frequency",
)
ROW_FIELDS: Final = (*INT_FIELDS, *FLOAT_FIELDS)
FIELD: Final = {name: place for place, name in enumerate(ROW_FIELDS)}

_SAMPLING: Final = struct.Struct("=5iIi6f")
"""A record from "length" on; seeds use all 32 bits."""

IDLE, DECODE, START = range(3)
"""Kinds of rows: padding or in the middle of its prompt; decoding; ends its prompt in step 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """What all buckets of a deployment share."""

    tile: int
    table_pages: int
    step_buffer: int
    max_rows: int

    def size(self, bucket: Bucket) -> int:
        """int32 words of a packed buffer."""
        rows = bucket.rows * (len(ROW_FIELDS) + MAX_STOP + self.table_pages)
        return HEADER + rows + bucket.tiles * (3 + self.tile)


def split(buffer, bucket: Bucket, shape: BatchShape):
    """Views of the parts of a packed buffer, on either side: numpy or traced jax arrays."""
    sizes = (
        (HEADER,),
        (bucket.rows, len(ROW_FIELDS)),
        (bucket.rows, MAX_STOP),
        (bucket.rows, shape.table_pages),
        (bucket.tiles, 3),
        (bucket.tiles, shape.tile),
    )
    parts, start = [], 0
    for size in sizes:
        words = int(np.prod(size))
        parts.append(buffer[start : start + words].reshape(size))
        start += words
    return parts


class Packer:
    """Packs plans. Keeps each slot's sampling record and page-table row, so that a decoding row
    costs a copy of what is already there.

    What it packs, the device reads and writes unasked: so pages must be among the pool's
    `num_pages`, and no row may reach beyond the tokens that its pages hold.
    """

    def __init__(
        self, shape: BatchShape, buckets: tuple[Bucket, ...], *, num_pages: int, page_size: int
    ):
        self._shape, self._num_pages, self._page_size = shape, num_pages, page_size
        self._buckets = Buckets(buckets, tile=shape.tile)
        slots = shape.max_rows
        self._records = np.zeros((slots, len(ROW_FIELDS)), np.int32)
        self._stop = np.full((slots, MAX_STOP), -1, np.int32)
        self._tables = np.zeros((slots, shape.table_pages), np.int32)
        self._extras = np.zeros(slots, bool)
        self._logprobs = np.zeros(slots, bool)
        self._greatest = [0] * slots  # pages of each slot's table that are written
        self._tile_starts = shape.tile * np.arange(self._buckets.most_tiles, dtype=np.int32)

    def bucket(self, plan: SlicePlan) -> Bucket:
        """The smallest bucket that holds the plan. Raises ValueError when none does."""
        chunks = [row.chunk.tokens.size for row in plan.rows if row.chunk is not None]
        return self._buckets.smallest(len(plan.rows), chunks)

    def pack(self, plan: SlicePlan) -> tuple[Bucket, np.ndarray, np.ndarray]:
        """The bucket, the packed buffer, and the order: `order[i]` is the plan's row in place i.

        Rows go longest first, which is how the attention over pages wants them. Raises ValueError
        for a plan that no bucket holds, or that would reach outside the pool or a row's own pages.
        """
        bucket = self.bucket(plan)
        buffer = np.zeros(self._shape.size(bucket), np.int32)
        header, rows, stop, tables, tiles, tokens = split(buffer, bucket, self._shape)
        cover_B = np.array([row.cover for row in plan.rows], np.int32)
        self._check_cover(plan, cover_B)
        order = np.argsort(-cover_B, kind="stable")
        num_rows = order.size
        slots = np.array([row.slot for row in plan.rows], np.intp)[order]
        place_of = np.argsort(order).tolist()
        kinds = np.full(num_rows, DECODE, np.int32)
        sample_from = bucket.tiles * self._shape.tile + np.arange(num_rows, dtype=np.int32)
        next_tile, greatest = 0, self._greatest
        for i, row in enumerate(plan.rows):
            if row.chunk is not None:
                place = place_of[i]
                last = self._put_chunk(row.chunk, place, next_tile, tiles, tokens)
                next_tile += -(-row.chunk.tokens.size // self._shape.tile)
                kinds[place], sample_from[place] = IDLE, 0
                if row.start is not None:
                    self._set_record(row.slot, row.start)
                    kinds[place], sample_from[place] = START, last
                greatest[row.slot] = 0  # what is written may be another request's
            if greatest[row.slot] < len(row.pages):
                self._grow_table(row)
        records = self._records
        records[slots, FIELD["slot"]] = slots
        records[slots, FIELD["kind"]] = kinds
        records[slots, FIELD["steps"]] = np.array([row.steps for row in plan.rows], np.int32)[order]
        records[slots, FIELD["cover"]] = cover_B[order]
        records[slots, FIELD["sample_from"]] = sample_from
        rows[:num_rows] = self._records[slots]
        rows[num_rows:, FIELD["slot"]] = self._shape.max_rows  # out of range: dropped
        rows[num_rows:, FIELD["repetition"]] = _bits(1.0)
        stop[:num_rows], stop[num_rows:] = self._stop[slots], -1
        tables[:num_rows] = self._tables[slots]
        header[:] = (
            plan.steps,
            plan.quorum,
            self._extras[slots].any(),
            self._logprobs[slots].any(),
        )
        return bucket, buffer, order

    def wants_logprobs(self, plan: SlicePlan) -> bool:
        """Whether a row of the plan asked for log-probabilities."""
        return bool(self._logprobs[[row.slot for row in plan.rows]].any())

    def _check_cover(self, plan: SlicePlan, cover_B: np.ndarray) -> None:
        held_B = self._page_size * np.array([len(row.pages) for row in plan.rows])
        end_B = [
            0 if row.chunk is None else row.chunk.start + row.chunk.tokens.size for row in plan.rows
        ]
        wanted_B = np.maximum(cover_B, end_B)
        if (wanted_B > held_B).any():
            b = int(np.argmax(wanted_B - held_B))
            raise ValueError(
                f"slot {plan.rows[b].slot}: {wanted_B[b]} tokens on pages for {held_B[b]}"
            )

    def _grow_table(self, row: RowPlan) -> None:
        known, pages = self._greatest[row.slot], row.pages
        if len(pages) > self._shape.table_pages:
            raise ValueError(
                f"slot {row.slot}: {len(pages)} pages, a page table has {self._shape.table_pages}"
            )
        added = pages[known:]
        if min(added) < 0 or max(added) >= self._num_pages:
            raise ValueError(f"slot {row.slot}: pages {added}, the pool has {self._num_pages}")
        self._tables[row.slot, known : len(pages)] = added
        self._greatest[row.slot] = len(pages)

    def _set_record(self, slot: int, start: RowStart) -> None:
        params = start.params
        record = _SAMPLING.pack(
            start.prompt.size + len(start.made),
            start.prompt.size,
            start.max_length,
            params.min_tokens,
            params.top_k,
            start.seed,
            params.ignore_eos,
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._records[slot, FIELD["length"] :] = np.frombuffer(record, np.int32)
        self._stop[slot] = -1
        if params.stop_token_ids:
            self._stop[slot, : len(params.stop_token_ids)] = params.stop_token_ids
        self._extras[slot] = params.needs_extras
        self._logprobs[slot] = params.logprobs is not None

    def _put_chunk(
        self, chunk: Chunk, place: int, tile: int, tiles: np.ndarray, tokens: np.ndarray
    ) -> int:
        """Lay a chunk out in tiles; returns the flat index of its last token."""
        size, width = chunk.tokens.size, self._shape.tile
        num = -(-size // width)
        tokens.reshape(-1)[tile * width : tile * width + size] = chunk.tokens
        mine = tiles[tile : tile + num]
        mine[:, 0], mine[:, 2] = place, width
        mine[:, 1] = self._tile_starts[:num]
        mine[:, 1] += chunk.start
        mine[-1, 2] = size - (num - 1) * width
        return tile * width + size - 1


def _bits(value: float) -> np.int32:
    return np.float32(value).view(np.int32)
