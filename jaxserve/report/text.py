"""Numbers, units and statistics as people read them. Knows no report."""

from typing import Any, Final

NOTHING: Final = "-"


def shown(value: Any, unit: str) -> str:
    """A value of a unit of `definitions.py`, such as "12.3 ms" or "98.1 %"."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if unit == "s":
        return seconds(float(value))
    if unit in ("steps", "rows"):
        return _three(value)  # means, with a point even where they are whole
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit in ("tokens/s", "requests/s"):
        return f"{magnitude(float(value))}/s"
    return magnitude(float(value))


def seconds(value: float | int) -> str:
    """With three digits that matter, in the unit that suits."""
    size = abs(value)
    for least, factor, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs")):
        if size >= least or unit == "µs":
            return f"{_three(value * factor)} {unit}" if value else "0 s"
    raise AssertionError(value)


def magnitude(value: float | int) -> str:
    """Whole numbers up to 99,999 in full; other ones with three digits that matter."""
    size = abs(value)
    if value == int(value) and size < 1e5:
        return f"{int(value):,}"
    for least, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            return f"{_three(value / least * (10 if letter == 'k' else 1))}{letter}"
    return _three(value)


def _three(value: float | int) -> str:
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def statistic(name: str) -> str:
    """The name of one of `definitions.STATISTICS`, such as "P99" or "mean"."""
    return name.upper() if name.startswith("p") else name
