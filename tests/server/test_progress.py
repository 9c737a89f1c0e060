"""Progress: plain lines where nobody can see a bar, a bar that goes away on a terminal."""

import io

from rich.console import Console

from jaxserve.server.progress import ProgressDisplay


def test_without_a_terminal_every_text_is_a_line():
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream, force_terminal=False))
    for text in ("model loaded", "compiling 1/2"):
        display.show(text)
    display.close()
    assert stream.getvalue() == "model loaded\ncompiling 1/2\n"


def test_on_a_terminal_the_text_moves_a_bar():
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream, force_terminal=True))
    display.show("compiling 1/2")
    display.close()
    display.close()
    display.show("KV pool: 3 pages")
    assert "compiling 1/2" in stream.getvalue()
    assert stream.getvalue().endswith("KV pool: 3 pages\n")
