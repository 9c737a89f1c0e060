"""What an engine core is built from."""

from dataclasses import dataclass

from jaxserve.config import SchedulerConfig
from jaxserve.request import Limits
from jaxserve.schedulers.estimators.serving_time import ServingTime
from jaxserve.schedulers.slicing import Adaptive, Fixed, Slicing, WholeSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """What a core is built from: limits of the model, size of the pool, and the policies' names.

    `tile` is the number of prompt tokens that step 0 rounds each chunk up to.
    """

    limits: Limits
    model_key: str
    num_pages: int
    page_size: int
    tile: int
    scheduler: SchedulerConfig
    prefix_cache: bool = True


def make_slicing(scheduler: SchedulerConfig, limits: Limits) -> Slicing:
    """The slicing that the configuration names."""
    depth = 2 if scheduler.overlap else 1
    match scheduler.slicing:
        case "sequence":
            return WholeSequence(limits.max_context)
        case "iteration":
            return Fixed(1, depth=depth)
        case "fixed":
            return Fixed(scheduler.slice_steps, depth=depth)
        case _:
            return Adaptive(
                scheduler.slice_steps,
                max_gap_s=scheduler.max_gap_ms / 1e3,
                overlap=scheduler.overlap,
                time=ServingTime(),
            )
