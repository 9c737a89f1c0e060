"""Azure's LLM inference traces of 2023 and 2024: CSV of a time stamp and two lengths.

Source: Azure/AzurePublicDataset, AzureLLMInferenceTrace_*.csv.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Final

from jaxserve.workload.readers.lines import MOST_TOKENS, NOTHING, Lines, Unquoted, count_rule
from jaxserve.workload.readers.row import Format, Head, Row

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_COUNT: Final = count_rule()


def _columns(lines: Lines, number: int, line: bytes) -> tuple[int, list[int]]:
    names = [name.strip() for name in line.decode(errors="replace").split(",")]
    for column in COLUMNS:
        if column not in names:
            raise lines.error(number, "header", ",".join(names), ",".join(COLUMNS))
    return len(names), [names.index(column) for column in COLUMNS]


def _head(lines: Lines) -> Head:
    _columns(lines, *lines.first())
    return Head(name=lines.name)


def _rows(lines: Lines) -> Iterator[tuple[int, Row]]:
    numbered = iter(lines)
    first = next(numbered, None)
    if first is None:
        return
    num_columns, (when, context, generated) = _columns(lines, *first)
    begin = None
    for number, line in numbered:
        cells = line.decode(errors="replace").split(",")
        if len(cells) != num_columns:
            got = Unquoted(f"{len(cells)} columns")
            raise lines.error(number, "line", got, f"{num_columns}, as the header has")
        try:
            at = datetime.fromisoformat(cells[when].strip())
            begin = begin or at
            arrival_s = (at - begin).total_seconds()
        except (ValueError, TypeError):  # TypeError: one has a time zone, the other none
            allowed = "a time stamp such as 2023-11-16 18:17:03.97, all with a time zone or none"
            raise lines.error(number, COLUMNS[0], cells[when], allowed) from None
        if arrival_s < 0:
            raise lines.error(number, COLUMNS[0], cells[when], "times that rise; try to sort by it")
        prompt = _count(lines, number, COLUMNS[1], cells[context])
        yield number, Row(arrival_s, prompt, _count(lines, number, COLUMNS[2], cells[generated]))


def _count(lines: Lines, number: int, field: str, text: str) -> int:
    digits = text.strip()
    # int() alone would take "1_000" and digits of other scripts.
    if digits.isascii() and digits.isdigit() and len(digits) <= 10:
        count = int(digits)
        if 1 <= count <= MOST_TOKENS:
            return count
    raise lines.error(number, field, text if text else NOTHING, _COUNT.allowed)


FORMAT: Final = Format(
    name="azure",
    summary="CSV: TIMESTAMP,ContextTokens,GeneratedTokens",
    matches=lambda first: first.upper().startswith(b"TIMESTAMP"),
    head=_head,
    rows=_rows,
    fields=("TIMESTAMP", "ContextTokens", "GeneratedTokens", "-"),
)
