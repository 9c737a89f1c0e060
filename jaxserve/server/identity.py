"""Who a request belongs to: API keys and the clients they stand for. Knows no transport.

With a key file every call needs a key, and the key alone says who the client is: what a request
says about itself (metadata, `client`, `user`) cannot split one tenant into many, nor borrow another
one's share. Without a file the request's word is taken, and marked as untrusted.

The file is TOML, one table per key (`jaxserve key` writes one):

    [[keys]]
    client = "acme"
    sha256 = "<64 hex digits>"
    weight = 2.0             # share of the client beside the others'; default 1
    priority = [0, 10]       # least and most that its requests may ask for; default: any

A client may have several keys, so that one can be replaced while the other still works. The file
is read again when it changes. Keys are stored as SHA-256: they are long and random, so a slow hash
would protect nothing.
"""

import hashlib
import hmac
import logging
import math
import os
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxserve.errors import BadRequest, ConfigError, Unauthenticated

ANONYMOUS: Final = "anonymous"
AUTHORIZATION: Final = "authorization"
CLIENT_KEY: Final = "x-jaxserve-client"
MAX_NAME_CHARS: Final = 128
KEY_PREFIX: Final = "jsk-"
LOOK_AGAIN_S: Final = 1.0
_FIELDS: Final = ("client", "sha256", "weight", "priority")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The party that fairness is owed to.

    `trusted` says that a key named it. `priorities` are the least and the most that its requests
    may ask for; None allows any.
    """

    client: str
    trusted: bool = False
    weight: float = 1.0
    priorities: tuple[int, int] | None = None

    def priority(self, wanted: int) -> int:
        """The priority of a request that asks for `wanted`; 0, the default, means the nearest
        allowed. Raises BadRequest for another one that is not allowed."""
        if self.priorities is None:
            return wanted
        least, most = self.priorities
        if wanted != 0 and not least <= wanted <= most:
            allowed = f"{least} to {most}, as the API key says (smaller is more urgent)"
            raise BadRequest("priority", wanted, allowed)
        return min(max(wanted, least), most)


class Gate:
    """Tells who calls. `keys_file` None takes a request's own word.

    Raises ConfigError when the file cannot be used. `clock` is in seconds.
    """

    def __init__(
        self, keys_file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ):
        self._path = keys_file
        self._clock = clock
        self._looked_at_s = clock()
        self._version = self._stat()
        self._callers = {} if keys_file is None else read_keys(keys_file)

    @property
    def has_keys(self) -> bool:
        return self._path is not None

    def identify(self, headers: Mapping[str, str], *, claimed: str = "") -> Caller:
        """The caller, by `headers` with lower-case names; `claimed` is the request's own word.

        Raises Unauthenticated without a valid key where keys are in use, BadRequest for a name
        that is too long.
        """
        if self._path is not None:
            self._look_again(self._path)
            return self._find(headers.get(AUTHORIZATION, ""))
        client = headers.get(CLIENT_KEY) or claimed or ANONYMOUS
        if len(client) > MAX_NAME_CHARS:
            raise BadRequest("client", client, f"at most {MAX_NAME_CHARS} characters")
        return Caller(client=client)

    def _find(self, authorization: str) -> Caller:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("this server wants an API key: 'Authorization: Bearer <key>'")
        digest = key_digest(key.strip())
        found = None
        # Every entry is compared, whichever matches, so that time tells nothing about the keys.
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated("the API key is not known to this server")
        return found

    def _look_again(self, path: Path) -> None:
        """Read the file again if it changed; a damaged one leaves the keys as they were."""
        now_s = self._clock()
        if now_s - self._looked_at_s < LOOK_AGAIN_S:
            return
        self._looked_at_s = now_s
        version = self._stat()
        if version == self._version:
            return
        self._version = version
        try:
            self._callers = read_keys(path)
        except ConfigError as error:
            logger.error("%s; the keys read before still count", error)
        else:
            logger.info("api_keys: %s was read again: %d keys", path, len(self._callers))

    def _stat(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def key_digest(key: str) -> str:
    """What a key file holds of `key`: its SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def make_key() -> str:
    """A fresh key with 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> dict[str, Caller]:
    """Digest -> caller. Raises ConfigError naming file, entry, got and allowed."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"api_keys: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"api_keys: {path}: no TOML: {error}") from error
    entries = tables.get("keys")
    if tables.keys() != {"keys"} or not isinstance(entries, list) or not entries:
        got = ", ".join(tables) or "nothing"
        raise ConfigError(f"api_keys: {path}: got {got}; wanted at least one [[keys]] table only")
    callers: dict[str, Caller] = {}
    by_client: dict[str, Caller] = {}
    for number, entry in enumerate(entries, 1):
        try:
            digest, caller = _read_entry(entry)
            if digest in callers:
                raise ConfigError("sha256: got one that an earlier entry has; allowed: each once")
            if by_client.setdefault(caller.client, caller) != caller:
                raise ConfigError(
                    f"client: got {caller.client!r} with another weight or priority than in an"
                    " earlier entry; allowed: the same for all keys of a client"
                )
        except ConfigError as error:
            raise ConfigError(f"api_keys: {path}: entry {number}: {error}") from None
        callers[digest] = caller
    return callers


def _read_entry(entry: Any) -> tuple[str, Caller]:
    if not isinstance(entry, dict):
        raise ConfigError(f"got {entry!r}; wanted a table")
    for name in entry:
        if name not in _FIELDS:
            raise ConfigError(f"{name}: unknown; allowed: {', '.join(_FIELDS)}")
    client, digest = entry.get("client"), entry.get("sha256")
    if not isinstance(client, str) or not 0 < len(client) <= MAX_NAME_CHARS:
        raise ConfigError(f"client: got {client!r}; allowed: 1 to {MAX_NAME_CHARS} characters")
    if not isinstance(digest, str) or not _is_digest(digest):
        # The value is not shown: it might be a key, put there by mistake.
        raise ConfigError("sha256: got something else; allowed: 64 hex digits (`jaxserve key`)")
    weight = entry.get("weight", 1.0)
    good = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (good and math.isfinite(weight) and weight > 0):
        raise ConfigError(f"weight: got {weight!r}; allowed: a positive number")
    priorities = entry.get("priority")
    return digest.lower(), Caller(
        client=client,
        trusted=True,
        weight=float(weight),
        priorities=None if priorities is None else _read_range(priorities),
    )


def _read_range(value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(bound) is int for bound in value):
        least, most = value
        if least <= most:
            return least, most
    raise ConfigError(f"priority: got {value!r}; allowed: [least, most], whole numbers")


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(digit in "0123456789abcdefABCDEF" for digit in text)
