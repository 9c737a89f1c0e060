"""Turns results into the two tables of `scripts/bench_peers`. Takes whatever engines ran.

Where an engine ran more than once, its best run counts, for every engine alike: other work on the
machine only ever makes a run slower.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from jaxserve.bench.peers.protocol import (
    DECODE_POINTS,
    MODES,
    WINDOW_TEXT,
    DecodeResult,
    Result,
    WorkloadResult,
)

OURS: Final = "jaxserve"


def format_report(results: Sequence[Result]) -> str:
    """Both tables as text; the last column of each is jaxserve's rate over the peer's."""
    workload = [result for result in results if isinstance(result, WorkloadResult)]
    decode = [result for result in results if isinstance(result, DecodeResult)]
    parts = []
    if workload:
        parts.append("useful output tokens per second; " + WINDOW_TEXT)
        parts.append(_table(_workload_rows(workload)))
    if decode:
        parts.append("decode alone, greedy: tokens per second")
        parts.append(_table(_decode_rows(decode)))
    return "\n\n".join(parts)


def _workload_rows(results: Sequence[WorkloadResult]) -> list[list[str]]:
    best: dict[tuple[str, str], WorkloadResult] = {}
    runs: dict[tuple[str, str], int] = {}
    for result in results:
        key = (result.mode, result.peer)
        runs[key] = runs.get(key, 0) + 1
        if key not in best or result.tokens_per_s > best[key].tokens_per_s:
            best[key] = result
    table = [["mode", "engine", "end to end", "window", "wall s", "runs", f"{OURS} / engine"]]
    for mode in MODES:
        for (_, peer), result in ((key, best[key]) for key in best if key[0] == mode):
            ours = best.get((mode, OURS))
            table.append(
                [
                    mode,
                    peer,
                    f"{result.tokens_per_s:,.0f}",
                    f"{result.window_tokens_per_s:,.0f}",
                    f"{result.wall_s:.1f}",
                    str(runs[mode, peer]),
                    _ratio(ours and ours.tokens_per_s, result.tokens_per_s),
                ]
            )
    return table


def _decode_rows(results: Sequence[DecodeResult]) -> list[list[str]]:
    best: dict[tuple[int, int, str], float] = {}
    for result in results:
        key = (result.rows, result.context, result.peer)
        best[key] = max(best.get(key, 0.0), result.tokens_per_s)
    table = [["rows", "context", "engine", "tokens/s", "ms/step", f"{OURS} / engine"]]
    for rows, context in DECODE_POINTS:
        for (_, _, peer), rate in ((k, best[k]) for k in best if k[:2] == (rows, context)):
            table.append(
                [
                    str(rows),
                    str(context),
                    peer,
                    f"{rate:,.0f}",
                    f"{1e3 * rows / rate:.2f}",
                    _ratio(best.get((rows, context, OURS)), rate),
                ]
            )
    return table


def _ratio(ours: float | None, theirs: float) -> str:
    return "-" if ours is None else f"{ours / theirs:.2f}"


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
