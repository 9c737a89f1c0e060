"""Readers of trace files: a format each, and `trace.py`, which makes a workload of any."""

from jaxserve.workload.readers.trace import CLIENT_FROM, FORMATS, read_trace

__all__ = ["CLIENT_FROM", "FORMATS", "read_trace"]
