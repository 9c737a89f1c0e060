"""What the load client asks of a dialect: send one request, say what came when, and how it ended.

Knows no socket. The dialects are `grpc_transport.py` and `http_transport.py`.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.workload.work import Work

OnTokens = Callable[[float, int], None]
"""Called with the time (`time.perf_counter`) at which so many more output tokens came."""

REFUSED: Final = "refused"
PROBE_S: Final = 1.0
PROBES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a request ended: `reason` as `Recorder.ended` has it.

    `fault` is the kind of an error, such as "RESOURCE_EXHAUSTED" or "HTTP 429", else empty;
    `message` is what the server said of it. `lost`: the connection failed, so the server may be
    gone. `prompt_tokens` is 0 where the server does not count them.
    """

    reason: str
    cached_tokens: int = 0
    prompt_tokens: int = 0
    fault: str = ""
    message: str = ""
    lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What the server says of itself; None: it does not say. `configuration` are its effective
    flags, `dispatch_s` what it measured of a slice when it started; one of ours has them."""

    model: str
    vocab_size: int | None = None
    max_context: int | None = None
    num_pages: int | None = None
    num_devices: int | None = None
    dispatch_s: float | None = None
    configuration: Mapping[str, str] = field(default_factory=dict)
    described: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What all requests of a run have in common.

    `keys` gives the API key of a client; `api_key` is everybody else's, "" for none. With
    `name_clients` requests say who they are for. `model` "" is the server's only one.
    """

    model: str = ""
    temperature: float = 0.0
    ignore_eos: bool = True
    name_clients: bool = True
    api_key: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    def key(self, client: str) -> str:
        return self.keys.get(client, self.api_key)


@runtime_checkable
class Transport(Protocol):
    """One dialect to one server. Belongs to the event loop it was made on."""

    @property
    def counted(self) -> str:
        """In words: where the counts of tokens come from."""
        ...

    async def facts(self) -> ServerFacts:
        """Asks the server. Raises ConfigError when it does not answer, or not in this dialect."""
        ...

    def prepare(self, work: Work, token_ids: np.ndarray) -> Any:
        """All that can be made of a request before it is due. `token_ids` is int32 [T]."""
        ...

    async def send(self, prepared: Any, timeout_s: float | None, on_tokens: OnTokens) -> Ending:
        """Send what `prepare` made and read the answer to its end; raises nothing of its own.

        `timeout_s` is until the request's deadline. Cancelled, it has the server drop the request.
        """
        ...

    async def alive(self) -> bool:
        """Whether the server can still be reached."""
        ...

    async def close(self) -> None: ...


def read_client_keys(path: str) -> dict[str, str]:
    """API keys by client, from a file of lines `client=key`; "" is no file. Raises ConfigError."""
    if not path:
        return {}
    keys = {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"client_keys: got {path!r} ({error}); allowed: a text file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        client, separator, key = (part.strip() for part in line.rpartition("="))
        if not (client and separator and key):
            # The line may hold a key, which is nobody's to read.
            raise ConfigError(f"client_keys: {path}:{number}: allowed: lines of client=key")
        keys[client] = key
    return keys


async def can_connect(host: str, port: int) -> bool:
    """Whether somebody listens there; asks a few times, for one that is busy."""
    for attempt in range(PROBES):
        if attempt:
            await asyncio.sleep(PROBE_S / 4)
        try:
            async with asyncio.timeout(PROBE_S):
                _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return True
        except (OSError, TimeoutError):
            pass
    return False


def split_address(server: str) -> tuple[str, int]:
    """Host and port of "host:port". Raises ConfigError."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"server: got {server!r}; allowed: host:port, such as 127.0.0.1:8470")
    return host.strip("[]"), int(port)
