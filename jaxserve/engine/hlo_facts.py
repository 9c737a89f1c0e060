"""What a compiled program does, read from its text, HLO after all of XLA's passes. Loads no JAX."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# `%name = bf16[8,128]{1,0} add(...`; a tuple's first member stands for it.
_INSTRUCTION: Final = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = \(?(\w+)\[([\d,]*)\]([^=\n]*?)[\s)}]([a-z][\w\-]*)\(", re.MULTILINE
)
_ON_CHIP: Final = "S(1)"
_COLLECTIVES: Final = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# These name an array, hand it on, or change a part of it where it lies. What is computed in a
# fusion stands in the fusion's own lines; a custom call is a kernel.
_MOVES_NOTHING: Final = frozenset(
    {
        "bitcast",
        "call",
        "conditional",
        "copy-done",
        "custom-call",
        "dynamic-update-slice",
        "fusion",
        "get-tuple-element",
        "optimization-barrier",
        "parameter",
        "scatter",
        "tuple",
        "while",
    }
)


@dataclass(frozen=True, slots=True)
class Result:
    """An instruction's result: `dtype` as HLO spells it, such as bf16, and the numbers in it.

    `on_chip`: it lies in the fast memory beside the cores, or comes from there.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    on_chip: bool


def results(text: str) -> Iterator[Result]:
    """The results of all instructions, of every computation."""
    for dtype, sizes, layout, operation in _INSTRUCTION.findall(text):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield Result(operation, dtype, shape, _ON_CHIP in layout)


def collectives(text: str) -> dict[str, int]:
    """How many of each collective the program has; those that run asynchronously count once."""
    names = (result.operation.removesuffix("-start") for result in results(text))
    return dict(sorted(Counter(name for name in names if name in _COLLECTIVES).items()))


def copies(text: str, sizes: frozenset[tuple[str, int]]) -> dict[str, int]:
    """Instructions that make an array of one of `sizes` (dtype, numbers in it) in the large memory,
    and how often. A small pool may be moved to the fast memory for good, which costs nothing."""
    found: Counter[str] = Counter()
    for result in results(text):
        numbers = 1
        for size in result.shape:
            numbers *= size
        moves = result.operation not in _MOVES_NOTHING and not result.on_chip
        if moves and (result.dtype, numbers) in sizes:
            shape = ",".join(map(str, result.shape))
            found[f"{result.operation} {result.dtype}[{shape}]"] += 1
    return dict(sorted(found.items()))
