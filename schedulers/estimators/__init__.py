"""Estimators: serving time, memory and output length. They may be wrong; nothing breaks if so."""
