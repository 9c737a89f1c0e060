"""docs/add_a_policy.md, "An order", followed to the letter with a small one."""

from dataclasses import dataclass

import numpy as np
import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.request import Limits, Request, SamplingParams
from jaxserve.schedulers import catalog
from jaxserve.schedulers.catalog import ORDERS, OrderPolicy, describe, make_order, register
from jaxserve.schedulers.events import Arrive
from jaxserve.schedulers.laws import LAWS, OF_EVERYONE
from jaxserve.schedulers.order.base import Key, StaticOrder
from jaxserve.schedulers.parameters import require
from jaxserve.schedulers.toy_engine import PAGE


@dataclass(frozen=True, slots=True)
class ShortestLimitParameters:
    """`step`: limits are compared in units of so many tokens."""

    step: int = 1

    def __post_init__(self) -> None:
        require(self.step > 0, "step", self.step, "1 or more tokens")


class ShortestLimit(StaticOrder):
    """Smallest output limit first, then arrival. Starves whoever asks for much."""

    def __init__(self, parameters: ShortestLimitParameters):
        super().__init__()
        self._parameters = parameters

    def key(self, event: Arrive) -> Key:
        return (event.max_output // self._parameters.step,)


POLICY = OrderPolicy(
    name="shortest_limit",
    summary="smallest output limit first",
    source="-",
    standing="project rule",
    make=lambda parameters, page_size: ShortestLimit(parameters),
    parameters=ShortestLimitParameters,
    laws=(*OF_EVERYONE, "work_conserving"),
    aliases=("slf",),
)


@pytest.fixture
def registered():
    register(POLICY)
    yield
    del catalog._known[POLICY.name]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("law", POLICY.laws)
def test_it_is_held_to_the_laws_it_claims(law: str) -> None:
    for seed in range(3):
        LAWS[law](lambda: make_order("shortest_limit", POLICY.tight, page_size=PAGE), seed)


@pytest.mark.usefixtures("registered")
def test_the_engine_runs_it() -> None:
    core = EngineCore(
        CoreConfig(
            limits=Limits(vocab_size=97, max_context=256, max_samples=1),
            model_key="test",
            num_pages=100,
            page_size=8,
            tile=8,
            scheduler=SchedulerConfig(order="slf", order_options=("step=10",), max_rows=1),
        )
    )
    for limit in (30, 12, 15, 3):
        params = SamplingParams(max_tokens=limit, ignore_eos=True)
        prompt = np.ones(3, np.int32)
        core.submit(Request(request_id=f"limit-{limit}", prompt=prompt, params=params), 0.0)
    device, ended = ScriptedExecutor(vocab_size=97), []
    while not core.idle:
        plan = core.next_slice(0.0)
        assert plan is not None
        core.complete(device.wait(device.dispatch(plan)), 0.0)
        ended += [delta.request_id for delta in core.take_deltas() if delta.finish is not None]
    assert ended == ["limit-3", "limit-12", "limit-15", "limit-30"]


@pytest.mark.usefixtures("registered")
def test_it_is_listed_and_its_faults_are_told_by_name() -> None:
    assert ORDERS["shortest_limit"] is POLICY
    assert describe(POLICY)[:2] == [
        "shortest_limit slf: smallest output limit first",
        "  source: - (project rule)",
    ]
    with pytest.raises(ValueError, match="step: got 0; allowed: 1 or more tokens"):
        make_order("slf", ["step=0"], page_size=PAGE)
    with pytest.raises(ValueError, match="did you mean 'shortest_limit'"):
        make_order("shortest_limits", page_size=PAGE)


def test_a_name_that_is_taken_and_a_law_that_does_not_exist_are_refused() -> None:
    for name, alias, fault in (("fcfs", "slf", "fcfs"), ("mine", "edf", "edf")):
        clash = OrderPolicy(
            name=name, aliases=(alias,), summary="-", source="-", standing="code", make=POLICY.make
        )
        with pytest.raises(ValueError, match=f"order: got '{fault}'; allowed: a name that no"):
            register(clash)
    lawless = OrderPolicy(
        name="mine", summary="-", source="-", standing="code", make=POLICY.make, laws=("kindness",)
    )
    with pytest.raises(ValueError, match="law: got 'kindness'; allowed: everybody_is"):
        register(lawless)
    assert "mine" not in ORDERS
