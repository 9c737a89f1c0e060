"""Reads command lines, and is the only module that names absl. Knows no command and no JAX.

Values come from the command line (`--flagfile` included), else from the environment variable
JAXSERVE_<FLAG>, else from a flag that stands for several (`--preset`), else from the flag's
default. All that is wrong with them is said in one line.

Flags live in a `FlagValues` of their own rather than in absl's global one: libraries register
theirs there, and `jaxserve serve --help` should not list them.
"""

import difflib
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from absl import flags as absl_flags

from jaxserve.errors import ConfigError
from jaxserve.flag_table import Flag, Group

ENVIRONMENT_PREFIX: Final = "JAXSERVE_"
# Left to tests and their harnesses; never read by the product.
FREE_ENVIRONMENT_PREFIX: Final = "JAXSERVE_TEST_"

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class Setting:
    """One flag's effective value and where it came from: "" (the default), "environment", "flag" or
    the name of the flag that stood for it."""

    flag: Flag
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command line came to."""

    groups: tuple[Group, ...]
    by_name: Mapping[str, Setting]

    def record(self, kind: type[_Record]) -> _Record:
        """The configuration record `kind` with its flags set. Raises ConfigError on bad values."""
        found = [setting for setting in self.by_name.values() if setting.flag.record is kind]
        return _build(kind, {setting.flag.path: setting.value for setting in found})

    def values(self, kind: type) -> dict[str, Any]:
        """Fields of `kind` that are not left to their defaults."""
        return {
            setting.flag.path: setting.value
            for setting in self.by_name.values()
            if setting.flag.record is kind and setting.origin
        }

    def given(self, kind: type) -> list[str]:
        """Names of `kind`'s flags that the command line set."""
        return [
            name
            for name, setting in self.by_name.items()
            if setting.flag.record is kind and setting.origin == "flag"
        ]

    def as_text(self) -> dict[str, str]:
        """Effective values by flag name."""
        return {name: _shown(setting.value) for name, setting in self.by_name.items()}

    def describe(self) -> str:
        """All values, a few lines for a person; `*` marks what is not the default."""
        lines = ["configuration (* differs from the default):"]
        for group in self.groups:
            parts = [_marked(self.by_name[flag.name]) for flag in group.flags]
            lines += textwrap.wrap(
                " ".join(parts),
                width=100,
                initial_indent=f"  {group.title + ':':<12}",
                subsequent_indent=" " * 14,
                break_long_words=False,
                break_on_hyphens=False,
            )
        return "\n".join(lines)


def _shown(value: Any) -> str:
    match value:
        case None:
            return "unset"
        case bool():
            return str(value).lower()
        case tuple():
            return ",".join(value)
        case _:
            return str(value)


def _marked(setting: Setting) -> str:
    text = f"{setting.flag.name}={_shown(setting.value)}"
    if setting.value == setting.flag.default:
        return text
    return f"*{text}" if setting.origin == "flag" else f"*{text} ({setting.origin})"


def _build(kind: type[_Record], values: Mapping[str, Any]) -> _Record:
    """A record of `kind` from dotted paths; fields without a value keep their defaults."""
    arguments: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        head, _, rest = path.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            arguments[head] = value
    hints = typing.get_type_hints(kind)
    for head, inner in nested.items():
        arguments[head] = _build(hints[head], inner)
    return kind(**arguments)


class _Number(absl_flags.ArgumentParser[Any]):
    """absl's own number parsers answer with Python's words; this one says what is allowed."""

    def __init__(self, convert: type[int] | type[float]):
        self._convert = convert

    def parse(self, argument: Any) -> Any:
        try:
            return self._convert(argument)
        except ValueError:
            wanted = "a whole number" if self._convert is int else "a number"
            raise ValueError(f"allowed: {wanted}") from None

    def flag_type(self) -> str:
        return self._convert.__name__


class _Switch(absl_flags.BooleanParser):
    def parse(self, argument: Any) -> bool:
        try:
            return bool(absl_flags.BooleanParser().parse(argument))
        except ValueError:
            raise ValueError("allowed: true or false") from None


def _define(flag: Flag, values: absl_flags.FlagValues) -> None:
    kind = flag.kind
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    name, default = flag.name, flag.default
    if kind is bool:
        absl_flags.DEFINE_boolean(name, default, flag.help, flag_values=values)
        values[name].parser = _Switch()
    elif kind in (int, float):
        absl_flags.DEFINE(_Number(kind), name, default, flag.help, flag_values=values)
    elif kind is str:
        absl_flags.DEFINE_string(name, default, flag.help, flag_values=values)
    elif kind == tuple[str, ...]:
        absl_flags.DEFINE_multi_string(name, list(default), flag.help, flag_values=values)
    else:
        raise TypeError(f"flag {name}: no parser for {kind}")


def parse(
    groups: Sequence[Group],
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    known: Collection[str],
) -> Settings:
    """Read a command's flags. `known` are the flag names of all commands.

    Raises ConfigError, in one line, for an unknown flag or JAXSERVE_* variable, a value of the
    wrong type, a missing flagfile and for words that are no flag.
    """
    values = absl_flags.FlagValues()
    table = {flag.name: flag for group in groups for flag in group.flags}
    for flag in table.values():
        _define(flag, values)
    from_environment = _read_environment(table, values, environment, known)
    try:
        rest = values(["jaxserve", *arguments])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        hint = near(error.flagname, table, prefix="--")
        raise ConfigError(f"unknown flag --{error.flagname}{hint}") from None
    except absl_flags.CantOpenFlagFileError as error:
        raise ConfigError(f"flagfile: {str(error).removeprefix('ERROR:: ')}") from None
    except (absl_flags.Error, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    if rest:
        raise ConfigError(f"got {rest[0]!r}, which is no flag; flags look like --name=value")
    by_name = {}
    for name, flag in table.items():
        origin = "environment" if name in from_environment else ""
        value = values[name].value
        by_name[name] = Setting(
            flag,
            tuple(value) if isinstance(value, list) else value,
            "flag" if values[name].present else origin,
        )
    return Settings(tuple(groups), _filled(by_name))


def _filled(by_name: dict[str, Setting]) -> dict[str, Setting]:
    """With the values that flags stand for. Raises ConfigError."""
    chosen = {name: setting.value for name, setting in by_name.items() if setting.origin}
    filled = dict(by_name)
    for name, setting in by_name.items():
        if setting.flag.fill is None:
            continue
        try:
            values = setting.flag.fill(setting.value, chosen)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for other, value in values.items():
            origin = by_name[other].origin or name
            filled[other] = replace(by_name[other], value=value, origin=origin)
    return filled


def _read_environment(
    table: Mapping[str, Flag],
    values: absl_flags.FlagValues,
    environment: Mapping[str, str],
    known: Collection[str],
) -> set[str]:
    """Make JAXSERVE_<FLAG> variables the defaults; returns the names set. Raises ConfigError."""
    found = set()
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable.startswith(
            FREE_ENVIRONMENT_PREFIX
        ):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in known:
            hint = near(variable, [ENVIRONMENT_PREFIX + flag.upper() for flag in known])
            raise ConfigError(f"environment variable {variable}: no such flag{hint}")
        if name not in table:
            continue  # another command's flag
        try:
            values.set_default(name, value)
        except absl_flags.Error as error:
            text = " ".join(str(error).split()).replace(f"flag --{name}=", f"{variable}=", 1)
            raise ConfigError(f"environment variable {text}") from None
        found.add(name)
    return found


def near(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A question to end an error with, "; did you mean ...?", if a known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def help_text(groups: Sequence[Group]) -> str:
    """The flags of a command, grouped, one line each."""
    width = max(len(flag.name) for group in groups for flag in group.flags)
    lines = []
    for group in groups:
        lines.append(f"\n{group.title}:")
        for flag in group.flags:
            choices = f": {', '.join(flag.choices)}" if flag.choices else ""
            default = "" if flag.default in (None, "", ()) else f" [{_shown(flag.default)}]"
            lines.append(f"  --{flag.name:<{width}}  {flag.help}{choices}{default}")
    lines.append("\nalso: --flagfile=<file> reads flags from a file; --noX is --X=false;")
    lines.append(f"environment: {ENVIRONMENT_PREFIX}<FLAG>=value sets what no flag sets.")
    return "\n".join(lines)
