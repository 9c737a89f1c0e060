"""How a check of one parameter judges: what may be wrong raises CheckFailed, and says what.

Knows what honoured, accepted and refused mean, and of no parameter by name.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from jaxserve.bench.openai_asker import Asker, CheckFailed

HONOURED: Final = "honoured"
ACCEPTED: Final = "accepted"
REFUSED: Final = "refused"

Check = Callable[[Asker], Awaitable[None]]
Entry = tuple[str, Check]
"""What is said of a parameter, and the check that it is so."""


def equal(what: str, got: object, wanted: object) -> None:
    """Hold that an answer has what it should; `what` names it."""
    if got != wanted:
        raise CheckFailed(f"{what}: got {got!r}, wanted {wanted!r}")


def hold(holds: bool, text: str) -> None:
    """Raises CheckFailed with `text` where it does not hold."""
    if not holds:
        raise CheckFailed(text)


async def refuses(ask: Asker, name: str, value: object, **others: Any) -> None:
    """Hold that `value` is refused under the parameter's name, or that of a part of it."""
    import openai

    try:
        await ask(**{**others, name: value})
    except openai.BadRequestError as error:
        body = error.response.json()
        equal("the body's fields", list(body), ["error"])
        equal("the error's fields", sorted(body["error"]), ["code", "message", "param", "type"])
        equal("type", error.type, "invalid_request_error")
        part = (error.param or "").startswith((f"{name}.", f"{name}["))
        hold(error.param == name or part, f"param: got {error.param!r} for {name}={value!r}")
        return
    raise CheckFailed(f"{name}={value!r} was not refused")


async def changes_nothing(ask: Asker, name: str, value: object, **others: Any) -> None:
    """Hold that the answer is the one without the parameter."""
    plain = await ask.reference(**others)
    equal(f"text with {name}={value!r}", (await ask(**{**others, name: value})).text, plain.text)


def accepted(name: str, *, values: tuple[object, ...], wrong: object) -> Entry:
    """A parameter that changes no answer. That `wrong` is refused shows that it is read."""

    async def check(ask: Asker) -> None:
        for value in values:
            await changes_nothing(ask, name, value)
        await refuses(ask, name, wrong)

    return ACCEPTED, check


def refused(name: str, *values: object, neutral: tuple[object, ...] = ()) -> Entry:
    """A parameter that is refused, but for the values that ask for nothing."""

    async def check(ask: Asker) -> None:
        for value in values:
            await refuses(ask, name, value)
        for value in (*neutral, None):
            await changes_nothing(ask, name, value)

    return REFUSED, check


def honoured(check: Check) -> Entry:
    """A parameter whose effect `check` finds in the answer."""
    return HONOURED, check
