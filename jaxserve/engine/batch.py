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

from dataclasses import dataclass
from typing import Final

import numpy as np

from jaxserve.engine.plan import RowPlan, RowStart, SlicePlan
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

IDLE, DECODE, START = range(3)
"""Kinds of rows: padding or in the middle of its prompt; decoding; ends its prompt in step 0."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The static shape of one program: rows and prompt tiles (0: no prompts, decode only)."""

    rows: int
    tiles: int


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
    costs a copy of what is already there."""

    def __init__(self, shape: BatchShape, buckets: tuple[Bucket, ...]):
        self._shape = shape
        self._buckets = sorted(buckets)
        slots = shape.max_rows
        self._records = np.zeros((slots, len(ROW_FIELDS)), np.int32)
        self._stop = np.full((slots, MAX_STOP), -1, np.int32)
        self._tables = np.zeros((slots, shape.table_pages), np.int32)
        self._extras = np.zeros(slots, bool)
        self._logprobs = np.zeros(slots, bool)
        self._greatest: dict[int, int] = {}

    def bucket(self, plan: SlicePlan) -> Bucket:
        """The smallest bucket that holds the plan."""
        tile = self._shape.tile
        tiles = sum(-(-row.chunk.tokens.size // tile) for row in plan.rows if row.chunk is not None)
        for bucket in self._buckets:
            enough = bucket.rows >= len(plan.rows) and bucket.tiles >= tiles
            if enough and (bucket.tiles > 0) == (tiles > 0):
                return bucket
        raise ValueError(
            f"a slice of {len(plan.rows)} rows and {tiles} prompt tiles fits no program;"
            f" the largest is {self._buckets[-1]}"
        )

    def pack(self, plan: SlicePlan) -> tuple[Bucket, np.ndarray, np.ndarray]:
        """The bucket, the packed buffer, and the order: `order[i]` is the plan's row in place i.

        Rows go longest first, which is how the attention over pages wants them.
        """
        bucket = self.bucket(plan)
        buffer = np.zeros(self._shape.size(bucket), np.int32)
        header, rows, stop, tables, tiles, tokens = split(buffer, bucket, self._shape)
        order = np.array(sorted(range(len(plan.rows)), key=lambda i: -plan.rows[i].cover), np.intp)
        num_rows = order.size
        slots = np.fromiter((plan.rows[i].slot for i in order), np.intp, num_rows)
        next_tile = 0
        for place, i in enumerate(order):
            row = plan.rows[i]
            kind, sample_from = DECODE, bucket.tiles * self._shape.tile + place
            self._set_table(row)
            if row.start is not None:
                self._set_record(row.slot, row.start)
                kind = START
            if row.chunk is not None:
                last = self._put_chunk(row, place, next_tile, tiles, tokens)
                next_tile += -(-row.chunk.tokens.size // self._shape.tile)
                kind, sample_from = (START, last) if row.start is not None else (IDLE, 0)
            record = self._records[row.slot]
            record[FIELD["slot"]] = row.slot
            record[FIELD["kind"]] = kind
            record[FIELD["steps"]] = row.steps
            record[FIELD["cover"]] = row.cover
            record[FIELD["sample_from"]] = sample_from
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

    def _set_table(self, row: RowPlan) -> None:
        pages = row.pages
        table = self._tables[row.slot]
        if row.chunk is not None:
            table[: len(pages)] = pages
            self._greatest[row.slot] = len(pages)
            return
        known = self._greatest[row.slot]
        if known < len(pages):
            table[known : len(pages)] = pages[known:]
            self._greatest[row.slot] = len(pages)

    def _set_record(self, slot: int, start: RowStart) -> None:
        params = start.params
        ints = {
            "length": start.prompt.size + len(start.made),
            "prompt_length": start.prompt.size,
            "max_length": start.max_length,
            "min_tokens": params.min_tokens,
            "top_k": params.top_k,
            "seed": start.seed,
            "ignore_eos": params.ignore_eos,
        }
        floats = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
        }
        record = self._records[slot]
        for name, value in ints.items():
            record[FIELD[name]] = np.array(value, np.int64).astype(np.int32)
        for name, value in floats.items():
            record[FIELD[name]] = _bits(value)
        self._stop[slot] = -1
        self._stop[slot, : len(params.stop_token_ids)] = params.stop_token_ids
        self._extras[slot] = params.needs_extras
        self._logprobs[slot] = params.logprobs is not None

    def _put_chunk(
        self, row: RowPlan, place: int, tile: int, tiles: np.ndarray, tokens: np.ndarray
    ) -> int:
        """Lay a chunk out in tiles; returns the flat index of its last token."""
        assert row.chunk is not None
        size, width = row.chunk.tokens.size, self._shape.tile
        num = -(-size // width)
        tokens.reshape(-1)[tile * width : tile * width + size] = row.chunk.tokens
        tiles[tile : tile + num, 0] = place
        tiles[tile : tile + num, 1] = row.chunk.start + width * np.arange(num)
        tiles[tile : tile + num, 2] = np.minimum(width, size - width * np.arange(num))
        return tile * width + size - 1


def _bits(value: float) -> np.int32:
    return np.float32(value).view(np.int32)
