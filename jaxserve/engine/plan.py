"""What the core asks of an executor, and what it gets back. Plain host records; no JAX.

A slice: step 0 runs prompt chunks and one token of every decoding row together, then up to
`steps - 1` further decode steps follow without the host.
"""

import enum
from dataclasses import dataclass, field

import numpy as np

from jaxserve.request import SamplingParams


class Code(enum.IntEnum):
    """How a row left a slice, as the device reports it."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3  # its logits were not finite


@dataclass(slots=True, eq=False)
class RowStart:
    """A row's sampling state, set when its prompt ends. `max_length` counts prompt and output.

    `seed` is the sample's own. `prompt` and `made` are the tokens so far; `made` is not empty after
    a preemption.
    """

    params: SamplingParams
    seed: int
    max_length: int
    prompt: np.ndarray
    made: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Chunk:
    """Prompt tokens [T] int32 that step 0 runs, the first at position `start`."""

    tokens: np.ndarray
    start: int


@dataclass(slots=True, eq=False)
class RowPlan:
    """One row of a slice, as of its dispatch. `pages` is the lease's own list and may grow later.
    Never changed otherwise; not frozen, which takes three times as long.

    `slot` is its place in device state. It may add up to `steps` tokens, and none that would need a
    key or value at or beyond position `cover`: its lease ends there. `pages` is its page-table row.
    `start` comes with the chunk that ends its prompt; a row without chunk is decoding already.
    """

    slot: int
    steps: int
    cover: int
    pages: list[int]
    chunk: Chunk | None = None
    start: RowStart | None = None


@dataclass(slots=True, eq=False)
class SlicePlan:
    """One dispatch. `copies` (from page, to page) are made before anything else. Never changed."""

    number: int
    steps: int
    quorum: int
    rows: tuple[RowPlan, ...]
    copies: tuple[tuple[int, int], ...] = ()
    num_prefill_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prefill_tokens = sum(
            [row.chunk.tokens.size for row in self.rows if row.chunk is not None]
        )


@dataclass(frozen=True, slots=True, eq=False)
class SliceLogprobs:
    """Of tokens [S, B]: their log-probability [S, B] and the likeliest tokens [S, B, N]."""

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclass(slots=True, eq=False)
class SliceResult:
    """What a slice did, rows in the plan's order. Only the driver changes it: it knows `host_s`.

    `tokens[b]` are those that row b made, `codes[b]` is a `Code`; lists, which is what the core
    goes through row by row.
    `slice_s` is the time the device was busy with it, `host_s` the host's work around it,
    in seconds of its processor.
    `rows_run` and `prefill_run` are the bucket that really ran.
    """

    number: int
    steps_run: int
    tokens: list[list[int]]
    codes: list[int]
    slice_s: float
    rows_run: int = 0
    prefill_run: int = 0
    host_s: float = 0.0
    logprobs: SliceLogprobs | None = field(default=None)
