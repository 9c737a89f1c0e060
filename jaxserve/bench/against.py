"""The same workload through the simulator, for a comparison with the live run. One function."""

from collections.abc import Callable

from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.report.recorder import Recorder
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Workload


def simulated(settings: Settings, workload: Workload, make_feed: Callable[[], Feed]) -> Recorder:
    """What the simulator says of the workload. Raises ConfigError if it cannot run it."""
    raise ConfigError("against: got 'simulate'; allowed: unset: this build has no simulator yet")
