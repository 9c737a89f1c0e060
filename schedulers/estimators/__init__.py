"""Estimators: serving time now; memory and output length join them."""
