"""Which replica serves a request: one file per policy, pure over what is known of the replicas.
`jaxserve.schedulers.routing.catalog` names them."""

from .base import Choice, Dispatch, PrefixRouting, Routable, Routing
from .views import LoadReport, Views

__all__ = ["Choice", "Dispatch", "LoadReport", "PrefixRouting", "Routable", "Routing", "Views"]
