"""Generated workloads: who sends when (traffic.py), what (contents.py), by name (table.py)."""

from jaxserve.workload.generators.table import GENERATORS, Generator, describe, generate

__all__ = ["GENERATORS", "Generator", "describe", "generate"]
