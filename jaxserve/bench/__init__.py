"""Measuring jaxserve: against itself, against its promises, against others."""
