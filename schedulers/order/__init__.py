"""Orders: who is next, and who gives way. One file per policy; `ORDERS` names them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .base import Order
from .fcfs import Fcfs
from .priority import Priority

ORDERS: Mapping[str, Callable[[], Order]] = MappingProxyType({"fcfs": Fcfs, "priority": Priority})

__all__ = ["ORDERS", "Fcfs", "Order", "Priority"]
