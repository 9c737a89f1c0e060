"""Highest response ratio next, on a clock of tokens.

Source: policy `hrrn` of sgl-project/sglang; papers.md 2.3.
"""

from .response_ratio import ResponseRatio


class Hrrn(ResponseRatio):
    """By 1 + (prompt tokens the engine computed since arrival) / (own uncached tokens).

    Short prompts go first, long ones do not starve while the engine computes prompts. Steadier than
    seconds: while nothing is prefilled nobody overtakes. Equal uncached tokens make it fcfs.
    """
