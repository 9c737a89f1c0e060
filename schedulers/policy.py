"""What all catalogues share: the record of a policy, finding one by name, reading its options."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from .parameters import NoParameters, explain, read

Standing = Literal["published", "code", "re-implementation", "reconstruction", "project rule"]
"""How sure it is that a policy is what its source means; reconstruction is said in its summary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One choice among others of its kind. `make` of a kind gets an instance of `parameters`."""

    name: str
    summary: str
    source: str
    standing: Standing
    parameters: type = NoParameters
    laws: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_Kind = TypeVar("_Kind", bound=Policy)


def by_name(policies: Iterable[_Kind]) -> Mapping[str, _Kind]:
    """A catalogue of `policies`."""
    return MappingProxyType({policy.name: policy for policy in policies})


def find(kind: str, policies: Mapping[str, _Kind], name: str) -> _Kind:
    """The policy of that name or alias. Raises ValueError with the nearest names."""
    for policy in policies.values():
        if name == policy.name or name in policy.aliases:
            return policy
    aliases = [alias for policy in policies.values() for alias in policy.aliases]
    raise ValueError(not_found(kind, name, policies, aliases))


def not_found(kind: str, name: str, known: Iterable[str], aliases: Iterable[str] = ()) -> str:
    """What to say of a name that does not exist: the names that do, and the nearest, which may be
    an alias."""
    names = list(known)
    near = difflib.get_close_matches(name, [*names, *aliases], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{kind}: got {name!r}; allowed: {', '.join(names)}{hint}"


def read_options(kind: str, parameters: type, options: Iterable[str]) -> Any:
    """An instance of a policy's `parameters`, from texts such as "quantum=4096".

    Raises ValueError for a parameter or a value that does not exist.
    """
    try:
        texts = {}
        for option in options:
            parameter, equals, text = option.partition("=")
            if not equals:
                raise ValueError(f"got {option!r}; options look like parameter=value")
            if parameter in texts:
                raise ValueError(f"{parameter}: got it twice; allowed: once")
            texts[parameter] = text
        return read(parameters, texts)
    except ValueError as error:
        raise ValueError(f"{kind}_options: {error}") from None


def describe(policy: Policy) -> list[str]:
    """A policy in a few lines, for people."""
    parameters = ", ".join(explain(policy.parameters))
    names = " ".join((policy.name, *policy.aliases))
    lines = [f"{names}: {policy.summary}", f"  source: {policy.source} ({policy.standing})"]
    if parameters:
        lines.append(f"  parameters: {parameters}")
    if policy.laws:
        lines.append(f"  laws: {', '.join(policy.laws)}")
    return lines
