"""Generated workloads by name (table.py): who sends when (traffic.py), and what (the others)."""

from jaxserve.workload.generators.table import GENERATORS, Generator, describe, generate

__all__ = ["GENERATORS", "Generator", "describe", "generate"]
