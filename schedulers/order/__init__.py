"""Orders: who is next, and who gives way. One file per policy; `jaxserve.schedulers.catalog` names
them."""

from .base import Order, Refuses

__all__ = ["Order", "Refuses"]
