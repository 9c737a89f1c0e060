"""Which replica serves a request: one file per policy, pure over what is known of the replicas.
`jaxserve.schedulers.routing.catalog` names them."""

from .base import Choice, Dispatch, Routable, Routing
from .views import LoadReport, Views

__all__ = ["Choice", "Dispatch", "LoadReport", "Routable", "Routing", "Views"]
