"""Every admission rule and slicing keeps the laws it claims; each law catches one that does not."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.schedulers.admission import (
    BaseAdmission,
    Candidate,
    Memory,
    ReserveMax,
    ReservePrompt,
    RunningRows,
    SliceLease,
)
from jaxserve.schedulers.catalog import ADMISSIONS, SLICINGS, make_admission, make_slicing
from jaxserve.schedulers.rule_laws import (
    ADMISSION_LAWS,
    OF_EVERY_ADMISSION,
    OF_EVERY_SLICING,
    SLICING_LAWS,
)
from jaxserve.schedulers.slicing import Fixed, SliceBounds, SliceLength, SlicingView

FEW = settings() if settings().max_examples > 100 else settings(max_examples=5)
"""Laws run long; a full run keeps its many examples."""

SEEDS = st.integers(0, 10**6)


@pytest.mark.parametrize(
    ("name", "law"), [(policy.name, law) for policy in ADMISSIONS.values() for law in policy.laws]
)
@FEW
@given(seed=SEEDS)
def test_every_admission_rule_keeps_its_laws(name: str, law: str, seed: int) -> None:
    ADMISSION_LAWS[law](lambda: make_admission(name), seed)


@pytest.mark.parametrize(
    ("name", "law"), [(policy.name, law) for policy in SLICINGS.values() for law in policy.laws]
)
@FEW
@given(seed=SEEDS)
def test_every_slicing_keeps_its_laws(name: str, law: str, seed: int) -> None:
    SLICING_LAWS[law](lambda bounds: make_slicing(name, bounds=bounds), seed)


def test_everybody_claims_what_everybody_is_held_to() -> None:
    for policy in ADMISSIONS.values():
        assert set(OF_EVERY_ADMISSION) <= set(policy.laws) <= set(ADMISSION_LAWS), policy.name
    for policy in SLICINGS.values():
        assert set(OF_EVERY_SLICING) <= set(policy.laws) <= set(SLICING_LAWS), policy.name
        assert ("keeps_the_gap" in policy.laws) == policy.bounds_gap


# ---------------------------------------------------------------------------------------- twins


class TiresOfEveryone(ReserveMax):
    """Asks for more and more, even of who would be alone."""

    asked = 0

    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        self.asked += 1
        return super().admits(candidate, running, memory) and self.asked < 20


class LikesEvenPools(BaseAdmission):
    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        return candidate.cost_pages <= memory.available_pages and memory.available_pages % 2 == 0


class DrawsLots(ReserveMax):
    def admits(self, candidate: Candidate, running: RunningRows, memory: Memory) -> bool:
        lucky = not running or random.random() < 0.5
        return lucky and super().admits(candidate, running, memory)


class NeverStops(Fixed):
    def choose(self, view: SlicingView) -> SliceLength:
        return SliceLength(self.max_steps + 1, 1, 1)


class Moody(Fixed):
    def choose(self, view: SlicingView) -> SliceLength:
        return SliceLength(random.randint(1, self.max_steps), 1, 1)


ADMISSION_TWINS = {
    "accepted_is_served": TiresOfEveryone,
    "more_memory_never_refuses": LikesEvenPools,
    "same_events_same_answers": DrawsLots,
    "never_preempts": ReservePrompt,
    "never_preempts_in_step": SliceLease,
}
SLICING_TWINS = {"within_bounds": NeverStops, "same_slices_again": Moody, "keeps_the_gap": Fixed}


def breaks(law: Callable[[int], None]) -> bool:
    for seed in range(40):
        try:
            law(seed)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("law", ADMISSION_LAWS)
def test_every_law_catches_a_rule_that_breaks_it(law: str) -> None:
    assert breaks(lambda seed: ADMISSION_LAWS[law](ADMISSION_TWINS[law], seed))


@pytest.mark.parametrize("law", SLICING_LAWS)
def test_every_law_catches_a_slicing_that_breaks_it(law: str) -> None:
    def make(bounds: SliceBounds) -> Fixed:
        return SLICING_TWINS[law](bounds.slice_steps, depth=1)

    assert breaks(lambda seed: SLICING_LAWS[law](make, seed))
