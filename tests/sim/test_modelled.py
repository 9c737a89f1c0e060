"""The modelled device against the scripted one, and what it says of a slice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.clock import VirtualClock
from jaxserve.config import SchedulerConfig
from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.request import Limits, Request, SamplingParams
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.sim.modelled import ModelledExecutor, Outputs

VOCAB, EOS = 31, 7


class Steps:
    """A second for a step, and a tenth for the host."""

    def __init__(self) -> None:
        self.shapes: list[SliceShape] = []

    def slice_s(self, shape: SliceShape) -> float:
        self.shapes.append(shape)
        return float(shape.steps)

    def host_s(self, shape: SliceShape) -> float:
        return 0.1


def modelled(outputs: Outputs, clock: VirtualClock | None = None) -> tuple[ModelledExecutor, Steps]:
    time = Steps()
    buckets = Buckets([Bucket(4, 0), Bucket(8, 0), Bucket(8, 4)], tile=8)
    clock = clock or VirtualClock()
    device = ModelledExecutor(time, outputs, clock, buckets=buckets, vocab_size=VOCAB)
    return device, time


def output_length(prompt: list[int], max_tokens: int) -> int:
    """Of the scripted device, which counts up to the end of sequence."""
    until = (EOS - prompt[-1] - 1) % VOCAB + 1
    return min(until, max_tokens)


@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), st.integers(1, 24)),
        min_size=1,
        max_size=12,
    ),
    slicing=st.sampled_from(["adaptive", "fixed", "iteration", "sequence"]),
    slice_steps=st.integers(1, 9),
    num_pages=st.integers(8, 40),
)
def test_it_does_what_the_scripted_device_does(prompts, slicing, slice_steps, num_pages) -> None:
    """Same plans, same counts, codes and steps, on the way to every end: limits, stops, quorum,
    rows that drain, preempted ones."""
    core = EngineCore(
        CoreConfig(
            limits=Limits(vocab_size=VOCAB, max_context=64, max_samples=4),
            model_key="test",
            num_pages=num_pages,
            page_size=8,
            tile=8,
            scheduler=SchedulerConfig(
                max_rows=8, max_prefill_tokens=32, slicing=slicing, slice_steps=slice_steps
            ),
        )
    )
    outputs = Outputs()
    scripted = ScriptedExecutor(vocab_size=VOCAB, eos_token_ids=(EOS,))
    device, _ = modelled(outputs)
    for seed, (prompt, max_tokens) in enumerate(prompts):
        length = output_length(prompt, max_tokens)
        outputs.end_length[seed] = len(prompt) + length
        # What the scripted device goes on from after a preemption.
        outputs.tokens[seed] = [(prompt[-1] + 1 + i) % VOCAB for i in range(length)]
        params = SamplingParams(max_tokens=max_tokens, seed=seed)
        core.submit(
            Request(request_id=str(seed), prompt=np.array(prompt, np.int32), params=params), 0.0
        )
    flights = []
    made: dict[str, int] = {}
    for turn in range(1000):
        plan = core.next_slice(float(turn))
        if plan is not None:
            want, got = scripted.dispatch(plan)[0], device.dispatch(plan).result
            assert got.steps_run == want.steps_run
            assert [len(made) for made in got.tokens] == [len(made) for made in want.tokens]
            # A row that stops on its last token has both reasons to end.
            assert [code != 0 for code in got.codes] == [code != 0 for code in want.codes]
            flights.append(got)
        elif flights:
            core.complete(flights.pop(0), float(turn))
        else:
            break
        for delta in core.take_deltas():
            made[delta.request_id] = made.get(delta.request_id, 0) + len(delta.tokens)
    lengths = {str(i): output_length(*each) for i, each in enumerate(prompts)}
    assert core.idle and {name: made.get(name) for name in lengths} == lengths


def plan(number: int, *, steps: int, quorum: int = 8, start: RowStart | None = None) -> SlicePlan:
    chunk = None if start is None else Chunk(start.prompt, 0)
    row = RowPlan(slot=0, steps=steps, cover=64, pages=[0, 1], chunk=chunk, start=start)
    return SlicePlan(number, steps, quorum, (row,))


def test_slices_follow_each_other_and_say_what_ran() -> None:
    clock = VirtualClock(5.0)
    device, time = modelled(Outputs(end_length={3: 15}), clock)
    start = RowStart(
        params=SamplingParams(), seed=3, max_length=60, prompt=np.zeros(10, np.int32), made=()
    )
    first = device.dispatch(plan(1, steps=4, start=start))
    second = device.dispatch(plan(2, steps=4))
    assert (first.begin_s, first.ready_s) == (5.0, 9.0)
    assert (second.begin_s, second.ready_s) == (9.0, 10.0)  # one token was left
    with pytest.raises(AssertionError, match="still running"):
        device.wait(first)
    # Eight rows or four, whole tiles; contexts of 11 to 13 tokens, then of 14; ten prompt tokens.
    assert time.shapes == [SliceShape(4, 8, 36, 32, 55), SliceShape(1, 4, 14, 0, 0)]
    assert second.result.codes == [1] and len(second.result.tokens[0]) == 1
