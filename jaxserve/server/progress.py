"""Shows a start-up's progress: a bar on a terminal, plain lines elsewhere. Knows no engine.

Texts that count, such as "compiling 3/12", move the bar; others stand beside a spinner.
"""

import re

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_COUNT = re.compile(r"\b(\d+)/(\d+)\b")


class ProgressDisplay:
    """Writes to `console`. `close` takes the bar away; lines stay."""

    def __init__(self, console: Console):
        self._console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)

    def show(self, text: str) -> None:
        if self._bar is None:
            print(text, file=self._console.file, flush=True)
            return
        self._bar.start()  # idempotent; not before there is something to show
        count = _COUNT.search(text)
        done, total = map(int, count.groups()) if count else (0, None)
        self._bar.update(self._task, description=text, completed=done, total=total)

    def close(self) -> None:
        """Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
