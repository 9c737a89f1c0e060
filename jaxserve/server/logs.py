"""How a process writes its log: one line an event on stderr, with the process's name if given."""

import logging
import sys
from typing import Final

FORMAT: Final = "%(asctime)s.%(msecs)03d %(levelname).1s {process}%(name)s: %(message)s"
TIME_FORMAT: Final = "%H:%M:%S"


def set_up_logging(level: str, *, process: str = "") -> None:
    """Send jaxserve's events of `level` and above to stderr, and other libraries' warnings.

    `process` is written on each line, to tell an engine's from the front end's.
    """
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"{process} " if process else ""
    handler.setFormatter(logging.Formatter(FORMAT.format(process=prefix), TIME_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("jaxserve").setLevel(level.upper())
