"""Traces of Mooncake: JSON lines with timestamp in ms, lengths, and ids of blocks of 512 tokens.

Source: kvcache-ai/Mooncake, FAST25-release/traces.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from jaxserve.workload.readers.jaxserve_jsonl import BLOCK_IDS, is_block_ids
from jaxserve.workload.readers.lines import Lines, Rule, count_rule, explain_json, number_rule
from jaxserve.workload.readers.row import BlockIds, Count, Duration, Format, Head, Row

BLOCK_SIZE: Final = 512


class _Line(msgspec.Struct):
    timestamp: Duration
    input_length: Count
    output_length: Count
    hash_ids: BlockIds


_RULES: Final = {
    "timestamp": number_rule("milliseconds, 0 or more", needed=True),
    "input_length": count_rule(needed=True),
    "output_length": count_rule(needed=True),
    "hash_ids": Rule(BLOCK_IDS, is_block_ids, needed=True),
}


def _head(lines: Lines) -> Head:
    return Head(name=lines.name, block_size=BLOCK_SIZE)


def _rows(lines: Lines) -> Iterator[tuple[int, Row]]:
    decode = msgspec.json.Decoder(_Line).decode
    for number, line in lines:
        try:
            told = decode(line)
        except ValueError as error:
            raise explain_json(lines, number, line, _RULES, error, strict=False) from None
        yield (
            number,
            Row(
                told.timestamp / 1e3,
                told.input_length,
                told.output_length,
                block_hashes=told.hash_ids,
            ),
        )


FORMAT: Final = Format(
    name="mooncake",
    summary="JSON lines: timestamp (ms), input_length, output_length, hash_ids of 512 tokens",
    matches=lambda first: first.startswith(b"{") and b'"hash_ids"' in first,
    head=_head,
    rows=_rows,
    fields=("timestamp", "input_length", "output_length", "hash_ids"),
)
