"""Depth first over the cached prefixes that requests wait for, the most wanted branch first.

Source: policy `dfs-weight` of sgl-project/sglang; papers.md 2.5. There equal branches stand by when
they were cached, here by when somebody began to wait for them.
"""

from ..events import Arrive
from ..waiting_tree import Rank
from ..weighted_tree import WeightedTree
from .lpm import PrefixOrder


class DfsWeight(PrefixOrder[WeightedTree]):
    """Requests that share a cached prefix one after the other, so that it is not evicted between
    them; those with more of it first, ties by arrival. Starves whoever shares nothing with others.
    """

    def __init__(self) -> None:
        super().__init__(WeightedTree())

    def rank(self, event: Arrive) -> Rank:
        return (event.number,)
