"""Models as data over one decoder. Importing this package loads no JAX; `decoder` does."""
