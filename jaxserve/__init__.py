"""jaxserve: fair, local, slice-level LLM serving on JAX. Importing this package loads no JAX."""

__version__ = "0.1.0"
