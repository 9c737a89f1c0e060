"""Stop strings in streamed text: what is certain, what may become a match, what matched.

Knows characters only. The match that counts is the one that ends first, and of those the longest:
a rule about characters, so that the split into slices cannot change it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """`stop` was found; it ends with character number `end`, from 1, of the text just fed."""

    stop: str
    end: int


class StopMatcher:
    """Watches one sample's text for any of `stops`, none of them empty."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops))
        self._held = ""

    @property
    def num_held(self) -> int:
        """Characters held back because a match may have begun."""
        return len(self._held)

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, Match | None]:
        """Take `text`; return the text that became certain, and the match if one ended in `text`.

        The certain text stops in front of the match. With `armed` False (before `min_tokens`) a
        match that ends in `text` does not count, but one may begin there.
        """
        num_before = len(self._held)
        buffer = self._held + text
        if armed:
            found = self._find(buffer, num_before)
            if found is not None:
                start, stop = found
                self._held = ""
                return buffer[:start], Match(stop, start + len(stop) - num_before)
        certain = self._held_from(buffer)
        self._held = buffer[certain:]
        return buffer[:certain], None

    def flush(self) -> str:
        """The text held back: the sample is over and no match can complete."""
        held, self._held = self._held, ""
        return held

    def _find(self, buffer: str, num_before: int) -> tuple[int, str] | None:
        """Start and string of the first match to end behind `num_before` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop, max(0, num_before - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _held_from(self, buffer: str) -> int:
        """Where the longest suffix starts that is a proper prefix of a stop string."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if buffer[start] in self._first_characters:
                suffix = buffer[start:]
                if any(stop.startswith(suffix) and stop != suffix for stop in self._stops):
                    return start
        return len(buffer)
