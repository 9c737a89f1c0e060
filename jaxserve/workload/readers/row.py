"""One line of a trace, whatever its format. `trace.py` makes requests of rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta, Struct

from jaxserve.workload.readers.lines import MOST_TOKENS, Lines
from jaxserve.workload.tokens import MOST_BLOCK_ID

Count = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
BlockIds = tuple[Annotated[int, Meta(ge=0, le=MOST_BLOCK_ID)], ...]
Duration = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


class Row(Struct, forbid_unknown_fields=True):
    """A request as a file tells of it. `arrival_s` counts from the file's start."""

    arrival_s: Duration
    prompt_tokens: Count
    output_tokens: Count
    client: str | None = None
    session: str | None = None
    block_hashes: BlockIds | None = None
    max_tokens: Count | None = None
    weight: Positive | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    deadline_s: Positive | None = None
    abort_s: Duration | None = None
    think_s: Duration | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a file says before its requests, or its format does. `block_size` 0: no blocks."""

    name: str
    block_size: int = 0
    described: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format. `matches(first line)`; `head(lines)`; `rows(lines)` gives line numbers and rows.

    The last two raise ConfigError for what is not of the format. `fields` are the names that a file
    has for arrival_s, prompt_tokens, output_tokens and block_hashes, for errors about several rows.
    """

    name: str
    summary: str
    matches: Callable[[bytes], bool]
    head: Callable[[Lines], Head]
    rows: Callable[[Lines], Iterator[tuple[int, Row]]]
    fields: tuple[str, str, str, str]
