"""grpc.health.v1: Check and a live Watch, for the whole server ("") and for each service by name.

Knows two facts, whether the replica is ready and whether the server drains. Decides nothing else.
"""

import asyncio
from collections.abc import Sequence

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health:
    """SERVING while the replica is ready and no drain has begun, for "" and all of `services`."""

    def __init__(self, services: Sequence[str]):
        self.servicer = health_aio.HealthServicer()
        self._services = ("", *services)
        self._ready = self._draining = False
        self._changed = asyncio.Event()
        self._changed.set()
        self._task = asyncio.get_running_loop().create_task(self._publish())

    @property
    def serving(self) -> bool:
        return self._ready and not self._draining

    def set_ready(self, ready: bool) -> None:
        """Listener of the link."""
        self._ready = ready
        self._changed.set()

    def begin_drain(self) -> None:
        """NOT_SERVING from now on."""
        self._draining = True
        self._changed.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _publish(self) -> None:
        # One task, because the servicer's `set` awaits its watchers and the link's calls cannot.
        while True:
            await self._changed.wait()
            self._changed.clear()
            status = health_pb2.HealthCheckResponse
            for service in self._services:
                await self.servicer.set(
                    service, status.SERVING if self.serving else status.NOT_SERVING
                )
