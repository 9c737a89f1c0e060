"""`jaxserve convert`: a Hugging Face directory becomes a model directory of ours.

The summary goes to stdout, progress to stderr. Exit codes: 0 done, 2 something the user can mend,
130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from jaxserve.flags import Settings
from jaxserve.server.logs import set_up_logging
from jaxserve.server.progress import ProgressDisplay
from jaxserve.server_config import ConvertConfig, LogConfig

if TYPE_CHECKING:
    from jaxserve.models.convert import Conversion

EXIT_INTERRUPTED: Final = 130


def main(settings: Settings) -> int:
    """Convert a model; returns the exit code. Raises ConfigError for what the user can mend."""
    config = settings.record(ConvertConfig)
    set_up_logging(settings.record(LogConfig).log_level)
    progress = ProgressDisplay(Console(stderr=True))
    try:
        done = run(config, progress)
    except KeyboardInterrupt:
        print("jaxserve: interrupted; what was written is no model yet", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        progress.close()
    print(summary(config, done))
    return 0


def run(config: ConvertConfig, display: ProgressDisplay) -> "Conversion":
    """Convert, with a line of progress on `display` now and then."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts: an accelerator would not help
    from jaxserve.models.byte_progress import byte_progress
    from jaxserve.models.convert import convert
    from jaxserve.models.sources import parse_source

    lines = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in lines:
            lines[stage] = byte_progress(display.show, verb=stage)
        lines[stage](done, total)

    return convert(
        parse_source(config.model), Path(config.output), dtype=config.dtype, progress=show
    )


def summary(config: ConvertConfig, done: "Conversion") -> str:
    """A line for what was done, and how to serve it."""
    gigabytes = done.num_bytes / 1e9
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in done.seconds.items())
    return (
        f"{done.num_tensors} tensors, {gigabytes:.2f} GB in {done.dtype}, read back and equal bit"
        f" for bit, in {sum(done.seconds.values()):.1f} s ({times})\n"
        f"try: jaxserve serve --model=orbax:{config.output}"
    )
