"""The project's own trace format: JSON lines, the first {"meta": {...}}, then a request each."""

import json
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from jaxserve.workload.readers.lines import (
    MOST_TOKENS,
    NOTHING,
    Lines,
    Rule,
    count_rule,
    explain_json,
    number_rule,
    optional,
)
from jaxserve.workload.readers.row import Format, Head, Row
from jaxserve.workload.tokens import MOST_BLOCK_ID

_META: Final = '{"meta": {"block_size": ...}} on the first line'


def is_block_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(block) is int and 0 <= block <= MOST_BLOCK_ID for block in value
    )


BLOCK_IDS: Final = f"a list of whole numbers, 0 to {MOST_BLOCK_ID}"
_RULES: Final = {
    "arrival_s": number_rule("seconds, 0 or more", needed=True),
    "prompt_tokens": count_rule(needed=True),
    "output_tokens": count_rule(needed=True),
    "client": Rule("a name or null", lambda value: value is None or isinstance(value, str)),
    "session": Rule("a name or null", lambda value: value is None or isinstance(value, str)),
    "block_hashes": optional(Rule(BLOCK_IDS, is_block_ids)),
    "max_tokens": optional(count_rule()),
    "weight": optional(number_rule("a positive number", positive=True)),
    "priority": optional(
        Rule("a whole number of 32 bits", lambda value: type(value) is int and abs(value) < 2**31)
    ),
    "deadline_s": optional(number_rule("a positive number", positive=True)),
    "abort_s": optional(number_rule("seconds, 0 or more")),
    "think_s": optional(number_rule("seconds, 0 or more")),
}


def _matches(first: bytes) -> bool:
    return first.startswith(b"{") and (b'"meta"' in first or b'"arrival_s"' in first)


def _head(lines: Lines) -> Head:
    number, line = lines.first()
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise lines.error(number, "meta", line.decode(errors="replace"), _META) from None
    meta = values.get("meta") if isinstance(values, dict) else None
    if not isinstance(meta, dict):
        raise lines.error(number, "meta", NOTHING, _META)
    block_size = meta.get("block_size")
    known = type(block_size) is int and 1 <= block_size <= MOST_TOKENS
    if block_size is not None and not known:
        allowed = "tokens in a block, 1 or more, or null"
        raise lines.error(number, "meta.block_size", block_size, allowed)
    described = {key: value for key, value in meta.items() if isinstance(value, str)}
    name = described.pop("name", "") or lines.name
    return Head(name=name, block_size=block_size or 0, described=described)


def _rows(lines: Lines) -> Iterator[tuple[int, Row]]:
    decode = msgspec.json.Decoder(Row).decode
    numbered = iter(lines)
    next(numbered, None)
    for number, line in numbered:
        try:
            yield number, decode(line)
        except ValueError as error:  # of msgspec, or for bytes that are no UTF-8
            raise explain_json(lines, number, line, _RULES, error, strict=True) from None


FORMAT: Final = Format(
    name="jaxserve",
    summary='JSON lines: {"meta": {...}}, then arrival_s, client, prompt_tokens, output_tokens,'
    " block_hashes, session",
    matches=_matches,
    head=_head,
    rows=_rows,
    fields=("arrival_s", "prompt_tokens", "output_tokens", "block_hashes"),
)
