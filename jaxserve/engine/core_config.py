"""What an engine core is built from."""

from dataclasses import dataclass

from jaxserve.config import SchedulerConfig
from jaxserve.request import Limits
from jaxserve.schedulers.estimators.serving_time import UNMEASURED_S


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """What a core is built from: limits of the model, size of the pool, and the policies' names.

    `tile` is the number of prompt tokens that step 0 rounds each chunk up to; `dispatch_s` is what
    a slice takes on the device beyond its steps and prompt tokens.
    """

    limits: Limits
    model_key: str
    num_pages: int
    page_size: int
    tile: int
    scheduler: SchedulerConfig
    prefix_cache: bool = True
    dispatch_s: float = UNMEASURED_S
