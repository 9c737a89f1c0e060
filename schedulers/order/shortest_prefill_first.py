"""Least to compute before the first token: shortest uncached prompt first.

Source: sgl-project/sglang; papers.md 2.5.
"""

from ..events import Arrive
from ..waiting_tree import Rank, WaitingTree
from .lpm import PrefixOrder


class ShortestPrefillFirst(PrefixOrder[WaitingTree]):
    """Fewest uncached prompt tokens first, ties by arrival. Long prompts starve under load."""

    def __init__(self, *, page_size: int):
        def uncached(match: int, least: Rank) -> Rank:
            num_tokens, number = least
            return (num_tokens - match * page_size, number)

        super().__init__(WaitingTree(uncached))

    def rank(self, event: Arrive) -> Rank:
        return (event.num_prompt_tokens, event.number)
