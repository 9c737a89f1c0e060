"""Decisions and bookkeeping: standard library, numpy, sortedcontainers. Imports no JAX."""
