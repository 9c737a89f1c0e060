"""Batches of least total time, by dynamic programming over requests sorted by length.

Published: SCLS batches by dynamic programming. Reconstruction: the objective and the recurrence
    best[i] = min over the last batch's size N of best[i - N] + T(N, length of i)
(papers.md 1.5). Batches of neighbours are enough while time and memory depend on the rows and the
longest of them alone, and fall with neither; `BilinearTime.grows_with_length` is to be asked
before. Of equal totals the one whose last batch is smaller wins.
"""

from typing import Any

import numpy as np

from ..estimators.bilinear import Bilinear, BilinearTime


def of_slice(time: BilinearTime, steps: int) -> Bilinear:
    """Seconds of a whole slice that prefills its rows and decodes `steps`: bilinear itself."""
    prefill, decode = time.prefill, time.decode
    contexts = steps * (steps + 1) / 2
    return Bilinear(
        rows_length=prefill.rows_length + steps * decode.rows_length,
        rows=prefill.rows + steps * decode.rows + contexts * decode.rows_length,
        length=prefill.length + steps * decode.length,
        fixed=prefill.fixed + steps * decode.fixed + contexts * decode.length,
    )


def cheapest_cuts(lengths: np.ndarray, most_rows: np.ndarray, cost: Bilinear) -> list[int]:
    """Where to cut `lengths` [n], ascending, into batches: the end of each, the last is n.

    `most_rows` [n] is how many rows a batch may have whose longest member is that one, at least 1.
    O(n log n + n * rows) time, one vector operation a request.
    """
    count = len(lengths)
    per_row = (cost.rows_length * lengths + cost.rows).tolist()
    once = (cost.length * lengths + cost.fixed).tolist()
    widths = np.minimum(most_rows, np.arange(1, count + 1)).tolist()
    sizes = np.arange(1.0, max(widths, default=0) + 1)
    # Backwards, best[i] at count - i, so that a window begins with the smallest last batch and
    # argmin, which takes the first of equals, keeps it.
    best = np.zeros(count + 1)
    size_of = [0] * (count + 1)
    for end, (row_s, batch_s, width) in enumerate(zip(per_row, once, widths, strict=True), 1):
        at = count - end
        totals = sizes[:width] * row_s
        totals += best[at + 1 : at + 1 + width]
        size = int(totals.argmin())
        best[at] = totals[size] + batch_s
        size_of[end] = size + 1
    return _walk_back(size_of)


def cheapest_mixed_cuts(
    lengths: np.ndarray,
    prefills: np.ndarray,
    time: BilinearTime,
    *,
    by_mean: bool,
    most_rows: int,
    steps: int,
) -> list[int]:
    """The same where only rows with `prefills` [n] (bool) are computed again, as `scls_resident`
    runs them: a batch costs the prefill of those and the decode of all, each at their mean length
    or, unless `by_mean`, at their longest.

    A heuristic: papers.md 1.5 relies on swaps that can raise such a cost, so that batches of
    neighbours need not be best.
    """
    count = len(lengths)
    decode = of_slice(BilinearTime(Bilinear(0.0, 0.0, 0.0, 0.0), time.decode), steps)
    longest = int(lengths[-1]) if count else 0
    if by_mean and 0 < count <= most_rows and _one_is_best(decode, time.prefill, longest):
        return [count]
    fresh_before = np.concatenate(([0], np.cumsum(prefills)))
    tokens_before = np.concatenate(([0], np.cumsum(lengths)))
    fresh_tokens_before = np.concatenate(([0], np.cumsum(lengths * prefills)))
    best = np.zeros(count + 1)
    size_of = [0] * (count + 1)
    longest_fresh = 0
    for end in range(1, count + 1):
        longest_fresh = int(lengths[end - 1]) if prefills[end - 1] else longest_fresh
        begins = np.arange(end - 1, max(0, end - most_rows) - 1, -1)
        rows, fresh = end - begins, fresh_before[end] - fresh_before[begins]
        if by_mean:
            length = (tokens_before[end] - tokens_before[begins]) / rows
            fresh_tokens = fresh_tokens_before[end] - fresh_tokens_before[begins]
            fresh_length = fresh_tokens / np.maximum(fresh, 1)
        else:
            length, fresh_length = lengths[end - 1], longest_fresh
        totals = best[begins] + _seconds(decode, rows, length)
        totals += np.where(fresh > 0, _seconds(time.prefill, fresh, fresh_length), 0.0)
        size = int(totals.argmin())
        best[end] = totals[size]
        size_of[end] = size + 1
    return _walk_back(size_of)


def _one_is_best(decode: Bilinear, prefill: Bilinear, longest: int) -> bool:
    """Whether two batches at mean lengths always cost more than both in one.

    What is linear in rows and tokens is the same for both. Of the rest one batch has less by a
    fixed cost and what a mean length costs, which is at most that of the longest row.
    """
    saved_s = decode.fixed + min(0.0, decode.length) * longest
    both_s = saved_s + prefill.fixed + min(0.0, prefill.length) * longest
    return saved_s > 0 and both_s > 0


def _seconds(model: Bilinear, rows: np.ndarray, length: Any) -> np.ndarray:
    return (model.rows_length * rows + model.length) * length + model.rows * rows + model.fixed


def _walk_back(size_of: list[int]) -> list[int]:
    """The ends of the batches from the size of the last batch of each prefix."""
    ends = []
    end = len(size_of) - 1
    while end:
        ends.append(end)
        end -= size_of[end]
    return ends[::-1]
