"""Jain's index of fairness, for the meter, the laws and the benchmarks alike."""

from collections.abc import Sequence


def jain(shares: Sequence[float]) -> float | None:
    """1 when all shares are equal, 1 / len(shares) when one has everything; None when nobody has
    anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None
