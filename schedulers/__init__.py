"""Decisions and bookkeeping: standard library and numpy. Imports no JAX."""
