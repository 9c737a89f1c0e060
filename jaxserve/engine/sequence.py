"""A request inside the engine, and the sequences (samples) it consists of."""

import enum
from dataclasses import dataclass, field

import numpy as np

from jaxserve.request import Request
from jaxserve.schedulers.pages import Lease


class Phase(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # it has no lease and no slot
    PREFILL = "prefill"  # its prompt is being run, chunk by chunk
    DECODE = "decode"
    EVICTING = "evicting"  # preempted; its last slice in flight is not parsed yet
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample while it runs. `made` are the output tokens the host knows, `length` counts them
    and the prompt, `max_length` the most there may be.

    `length` tokens (prompt, and what was made before a preemption) are to be prefilled; `computed`
    of them are dispatched or cached. `ahead` is the most tokens that slices in flight may add.
    """

    job: "Job"
    sample: int
    seed: int
    made: list[int] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    slot: int = -1
    lease: Lease | None = None
    computed: int = 0
    ahead: int = 0
    last_slice: int = 0
    started: bool = False  # the chunk that ends its prompt is dispatched
    step_limit: int = 0  # 0: none; set while a partial stop string is pending
    length: int = field(init=False)
    max_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.job.request.prompt.size
        self.max_length = self.length + self.job.max_output

    @property
    def remaining(self) -> int:
        """The most tokens it may still make beyond those the host knows."""
        return self.max_length - self.length

    def keep(self, num_tokens: int) -> None:
        """Forget all output behind the first `num_tokens`."""
        del self.made[num_tokens:]
        self.length = self.job.request.prompt.size + len(self.made)

    def tokens(self, start: int = 0) -> np.ndarray:
        """Prompt and output so far, from place `start` of the prompt on, int32 [T]."""
        prompt = self.job.request.prompt[start:]
        return np.concatenate([prompt, np.array(self.made, np.int32)]) if self.made else prompt


@dataclass(slots=True, eq=False)
class Job:
    """An accepted request. `sequences` are its unfinished samples, also while it waits.

    `page_keys` name the pages that its prompt could find cached; `num_cached` of them were when
    somebody last looked. `parent` prefills the shared
    prompt of several samples, in the slot of the first; they fork from its lease. `announced` means
    that a token of it was delivered. Times are the core's: of its arrival, of the first slice
    planned for it, and of its first token.
    """

    number: int
    request: Request
    max_output: int
    arrived_s: float
    page_keys: tuple[bytes, ...] = ()
    num_cached: int = 0
    admitted_s: float | None = None
    first_token_s: float | None = None
    sequences: list[Sequence] = field(default_factory=list)
    parent: Sequence | None = None
    cached_tokens: int = 0
    announced: bool = False
    running: bool = False

    def rows(self) -> list[Sequence]:
        """All its sequences, the parent too."""
        return self.sequences if self.parent is None else [*self.sequences, self.parent]
