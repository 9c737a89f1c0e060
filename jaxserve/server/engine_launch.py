"""What the supervisor and its engine process say to each other over the pipes. Knows no process.

One JSON line goes down stdin, an `EngineLaunch`; JSON lines come up stdout, `Progress` until
`Ready`, or one `Failure`. JSON rather than pickles: both sides can be read, logged and tested.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Final

from jaxserve.config import EngineConfig, record_from_dict

EXIT_CONFIG: Final = 2
"""The engine's exit code when the user can mend what kept it from starting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLaunch:
    """All that an engine process is told. `restarts` counts the engines that were lost before."""

    config: EngineConfig
    socket_path: str
    log_level: str = "info"
    restarts: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineLaunch":
        return record_from_dict(cls, json.loads(text))


@dataclass(frozen=True, slots=True)
class Progress:
    """A line for the person who waits."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine takes requests. `start_s` is the time it took to get there."""

    num_pages: int
    page_size: int
    num_programs: int
    device: str
    start_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the engine does not start; one line."""

    text: str


Status = Progress | Ready | Failure
_STATUSES: Final = {kind.__name__: kind for kind in (Progress, Ready, Failure)}


def status_to_line(status: Status) -> bytes:
    return (
        json.dumps({"kind": type(status).__name__, **dataclasses.asdict(status)}).encode() + b"\n"
    )


def status_from_line(line: bytes) -> Status:
    """Raises ValueError or KeyError for a line that is none."""
    fields = json.loads(line)
    return _STATUSES[fields.pop("kind")](**fields)
