"""Who gives way when pages run short and nobody's limit can be cut further.

A rule is a sorting key of running requests: the largest gives way first, and of equals the last in
the order. The engine hands out pages in the opposite sequence, so that whoever would give way is
also the first to be cut short. It always lets one request run on. Sources: papers.md section 2.7.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .events import RequestNumber


@dataclass(frozen=True, slots=True)
class Runner:
    """A running request: its number, which grows with arrival, the tokens of its prompt, and the
    output tokens the host knows of, over all samples."""

    number: RequestNumber
    num_prompt_tokens: int
    num_made: int


VictimKey = Callable[[Runner], tuple[int, ...]]
"""What running requests are sorted by; the largest gives way first."""


def newest(runner: Runner) -> tuple[int, ...]:
    """The latest arrival gives way."""
    return (runner.number,)


def fewest_made(runner: Runner) -> tuple[int, ...]:
    """Who has made least gives way: least is lost; of equals the longest prompt, most is freed."""
    return (-runner.num_made, runner.num_prompt_tokens)
