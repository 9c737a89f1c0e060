"""Shows a live run while it runs: one line that changes on a terminal, plain lines elsewhere."""

import asyncio
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jaxserve.bench.tally import Tally

PERIOD_S = 1.0
PLAIN_PERIOD_S = 5.0
"""Between lines that stay."""


class LiveDisplay:
    """`async with LiveDisplay(console, tally, "title"):` around a run."""

    def __init__(self, console: Console, tally: Tally, title: str):
        self._console, self._tally, self._title = console, tally, title
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)
        self._begun_s = time.monotonic()
        self._last = (self._begun_s, 0)

    async def __aenter__(self) -> "LiveDisplay":
        if self._live is not None:
            self._live.start()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._live is not None:
            self._live.stop()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S if self._live is not None else PLAIN_PERIOD_S)
            line = self.line()
            if self._live is None:
                print(line, file=self._console.file, flush=True)
            else:
                self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def line(self) -> str:
        """Where the run stands. Rates are since the last line."""
        tally, now_s = self._tally, time.monotonic()
        since_s, before = self._last
        self._last = now_s, tally.num_tokens
        rate = (tally.num_tokens - before) / max(now_s - since_s, 1e-9)
        ttft = tally.recent_ttft_s()
        shown = "-" if ttft is None else f"{1e3 * ttft[0]:.0f}/{1e3 * ttft[1]:.0f} ms"
        aborted = f"  aborted {tally.num_aborted}" if tally.num_aborted else ""
        return (
            f"{self._title}{now_s - self._begun_s:6.0f} s  sent {tally.num_sent}"
            f"  running {tally.num_running}  done {tally.num_done}  failed {tally.num_failed}"
            f"{aborted}  {rate:.0f} tokens/s  TTFT p50/p99 {shown}"
        )
