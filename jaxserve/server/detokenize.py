"""Token ids into text, a few at a time: no half character, no retracted text, O(new tokens).

Knows decoding only; stop strings and messages are others'. Two leaves: byte-level vocabularies
(the demo model's, Llama 3's, Qwen's) join bytes, everything else decodes a short window again.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

CONTEXT_TOKENS: Final = 5
"""Tokens decoded again before new ones: decoders look back one token, five is vLLM's choice."""

_UNKNOWN = "\ufffd"


@runtime_checkable
class Detokenizer(Protocol):
    """One sample's text. What `feed` returned stays; joined with `flush` it is the whole text."""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that became certain with `ids`."""
        ...

    def flush(self) -> str:
        """What was held back, with U+FFFD for a character that never became whole."""
        ...

    def save(self) -> Any:
        """The state, for `restore`."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to a saved state, so that tokens can be fed again one by one."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are byte strings. `table` maps ids to bytes; others are silent.

    Python's incremental UTF-8 decoder replaces maximal subparts, as Rust's `from_utf8_lossy` does,
    so that any split into slices equals `Tokenizer.decode` of the whole.
    """

    def __init__(self, table: Mapping[int, bytes]):
        self._bytes_of = table.get
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        bytes_of = self._bytes_of
        return self._decoder.decode(b"".join([bytes_of(i, b"") for i in ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)

    def save(self) -> tuple[bytes, int]:
        return self._decoder.getstate()

    def restore(self, state: tuple[bytes, int]) -> None:
        self._decoder.setstate(state)


class WindowDetokenizer:
    """For any decoder: decodes a window of recent tokens and gives out what its text gained.

    A trailing U+FFFD may be the beginning of a character, so it waits. `context` are the last
    tokens of the prompt: with them a first " word" keeps the blank that SentencePiece decoders
    strip from the start of a text. Where a decoder takes back what it said (byte fallback does,
    when a valid character is followed by an invalid byte) what was given out stands.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()):
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were given out
        self._slide(list(context))

    def feed(self, ids: Sequence[int]) -> str:
        self._window += ids
        text = self._decode(self._window)
        certain = len(text.rstrip(_UNKNOWN))
        if certain <= self._given:
            return ""
        new = text[self._given : certain]
        self._given = certain
        if certain == len(text):
            self._slide(self._window)
        return new

    def flush(self) -> str:
        text = self._decode(self._window)[self._given :]
        self._given += len(text)
        return text

    def save(self) -> tuple[list[int], int]:
        return list(self._window), self._given

    def restore(self, state: tuple[list[int], int]) -> None:
        window, self._given = state
        self._window = list(window)

    def _slide(self, ids: list[int]) -> None:
        """Shorten the window to the last tokens of `ids`, all of whose text was given out.

        The window must not begin inside a character (its text would start with U+FFFD) nor be
        without text (the next token would look like the start of the text).
        """
        window = ids[-CONTEXT_TOKENS:]
        text = self._decode(window) if window else ""
        if text and _UNKNOWN not in text:
            self._window, self._given = window, len(text)
