"""How long a slice takes on a device, and its host around it: the protocol and what goes in."""

from typing import Protocol, runtime_checkable

from .serving_time import SliceShape


@runtime_checkable
class SliceTime(Protocol):
    """A model of one deployment: model shape, device, precision."""

    def slice_s(self, shape: SliceShape) -> float:
        """Seconds that the device is busy with a slice."""
        ...

    def host_s(self, shape: SliceShape) -> float:
        """Seconds of the host's work around it, which overlap hides."""
        ...
