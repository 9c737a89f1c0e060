"""Lines of a trace file, plain or gzip, and errors that say where in it. Knows no format."""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from jaxserve.errors import ConfigError

MOST_TOKENS: Final = 2**31 - 1
_GZIP_MAGIC: Final = b"\x1f\x8b"
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a file that are not blank, numbered from 1; each iteration starts over."""

    path: str

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Raises ConfigError for a file that cannot be read, and where it cannot be read on."""
        number = 0
        try:
            with self._open() as file:
                for number, line in enumerate(file, 1):
                    line = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
                    if line:
                        yield number, line
        except EOFError:
            at = f"{self.path}, line {number + 1}"
            raise ConfigError(
                f"{at}: got a gzip file that ends early; allowed: a whole file; try to fetch it"
                " again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            at = f"{self.path}, line {number + 1}"
            raise ConfigError(f"{at}: got broken gzip ({error}); allowed: a whole file") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"trace: got {self.path!r} ({reason}); allowed: a file") from None

    def _open(self) -> BufferedReader | gzip.GzipFile:
        with open(self.path, "rb") as file:
            zipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        return gzip.open(self.path, "rb") if zipped else open(self.path, "rb")

    def first(self) -> tuple[int, bytes]:
        """The first line. Raises ConfigError for an empty file."""
        for numbered in self:
            return numbered
        raise ConfigError(
            f"trace: got {self.path!r}, which is empty; allowed: requests, one a line"
        )

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return Path(self.path).name.split(".", 1)[0] or self.path

    def error(self, number: int, field: str, got: object, allowed: str) -> ConfigError:
        shown = got if isinstance(got, Unquoted) else repr(got)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ConfigError(f"{self.path}, line {number}, {field}: got {shown}; allowed: {allowed}")


class Unquoted(str):
    """A word about what was got, in place of it."""


NOTHING: Final = Unquoted("nothing")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field may hold, in words and as a test."""

    allowed: str
    holds: Callable[[Any], bool]
    needed: bool = False


def number_rule(allowed: str, *, needed: bool = False, positive: bool = False) -> Rule:
    """Of a number that is not negative, or positive."""

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return value > 0 if positive else value >= 0

    return Rule(allowed, holds, needed)


def count_rule(*, needed: bool = False) -> Rule:
    """Of a number of tokens: not zero, for no engine runs such a request."""
    return Rule(
        f"a whole number, 1 to {MOST_TOKENS}; try to leave the line out",
        lambda value: type(value) is int and 1 <= value <= MOST_TOKENS,
        needed,
    )


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or null", lambda value: value is None or rule.holds(value))


def explain_json(
    lines: Lines,
    number: int,
    line: bytes,
    rules: Mapping[str, Rule],
    error: Exception,
    *,
    strict: bool,
) -> ConfigError:
    """What is wrong with a line that the decoder refused for `error`; `strict`: it may have no
    other fields."""
    try:
        # Python's own, for it takes NaN and numbers out of range: then their field can be named.
        values = json.loads(line)
    except (ValueError, RecursionError):
        return lines.error(number, "line", line.decode(errors="replace"), f"JSON ({error})")
    if not isinstance(values, dict):
        return lines.error(number, "line", values, "a JSON object")
    for name, rule in rules.items():
        if name not in values:
            if rule.needed:
                return lines.error(number, name, NOTHING, rule.allowed)
        elif not rule.holds(values[name]):
            return lines.error(number, name, values[name], rule.allowed)
    for name in values:
        if strict and name not in rules:
            return lines.error(
                number, name, values[name], f"no such field, only {', '.join(rules)}"
            )
    return lines.error(number, "line", line.decode(errors="replace"), f"({error})")
