"""Parameters of policies as frozen records: read from texts, judged, and explained.

A policy's parameters are a dataclass with a default for each field. `read` makes one of what a
command line says; a record judges itself in `__post_init__` with `require`.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any, Final, TypeVar

Record = TypeVar("Record")

MOST_PRICE: Final = 1e9
"""Of a token: sums of prices stay exact enough to be compared."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoParameters:
    """Of policies that have none."""


def require(condition: bool, name: str, got: object, allowed: str) -> None:
    """Raises ValueError unless `condition`."""
    if not condition:
        raise ValueError(f"{name}: got {got!r}; allowed: {allowed}")


def positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a positive number."""
    require(math.isfinite(value) and value > 0, name, value, "a positive number")


def not_negative(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a number, 0 or more."""
    require(math.isfinite(value) and value >= 0, name, value, "0 or more")


def at_least(name: str, value: int, least: int) -> None:
    """Raises ValueError unless `value` is a whole number, `least` or more."""
    require(value >= least, name, value, f"{least} or more")


def price(name: str, value: float) -> None:
    """Raises ValueError unless `value` is what a token may cost."""
    require(0 <= value <= MOST_PRICE, name, value, "0 or more, 1e9 at most")


def read(kind: type[Record], texts: Mapping[str, str]) -> Record:
    """The record whose fields `texts` set; the others keep their defaults.

    Raises ValueError for a name that the record does not have, with the nearest that it has, and
    for a value of a wrong type.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for name, text in texts.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(hints) or '-'}"
            raise ValueError(f"unknown parameter {name!r}; {hint}")
        values[name] = _value(name, hints[name], text)
    return kind(**values)


def explain(kind: type) -> list[str]:
    """Each field with its default as `read` takes it, and its choices if it has such."""
    hints = typing.get_type_hints(kind)
    return [
        f"{field.name}={_text(field.default)}{_choices(hints[field.name])}"
        for field in dataclasses.fields(kind)
    ]


def _text(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _choices(kind: Any) -> str:
    if typing.get_origin(kind) is not typing.Literal:
        return ""
    return f" ({'|'.join(typing.get_args(kind))})"


def _value(name: str, kind: Any, text: str) -> Any:
    if kind is bool:
        require(text in ("true", "false"), name, text, "true or false")
        return text == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name}: got {text!r}; allowed: {wanted}") from None
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        require(text in choices, name, text, ", ".join(choices))
    return text
