"""Orders as the engine core meets them: refusals on arrival, requests that do not fit, and free
memory."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.errors import DeadlinePassed
from jaxserve.request import Limits, Request, SamplingParams
from jaxserve.schedulers.prefix_tree import page_keys

VOCAB = 97
FEW = settings() if settings().max_examples > 100 else settings(max_examples=8)


def make_core(*, num_pages: int = 200, **scheduler) -> EngineCore:
    return EngineCore(
        CoreConfig(
            limits=Limits(vocab_size=VOCAB, max_context=256, max_samples=4),
            model_key="test",
            num_pages=num_pages,
            page_size=8,
            tile=8,
            scheduler=SchedulerConfig(**{"max_rows": 8, "slice_steps": 8, **scheduler}),
        )
    )


def request(name: str, tokens: int = 4, **fields) -> Request:
    params = {"max_tokens": 10, "ignore_eos": True, **fields.pop("params", {})}
    prompt = np.arange(tokens, dtype=np.int32) % VOCAB
    return Request(request_id=name, prompt=prompt, params=SamplingParams(**params), **fields)


def run(core: EngineCore, *, limit: int = 10_000, now_s: float = 0.0) -> list[str]:
    """Serve everybody; who ended, in sequence."""
    device, flights, ended = ScriptedExecutor(vocab_size=VOCAB), [], []
    for _ in range(limit):
        plan = core.next_slice(now_s)
        ended += [delta.request_id for delta in core.take_deltas() if delta.finish is not None]
        if plan is not None:
            flights.append(device.dispatch(plan))
        elif flights:
            core.complete(device.wait(flights.pop(0)), now_s)
            core.pool.check()
        elif core.idle:
            return ended
        else:
            raise AssertionError("nothing runs, and somebody waits")
    raise AssertionError("it does not end")


# --------------------------------------------------------------------------------------- refusals


def test_a_deadline_that_has_passed_is_refused_by_the_order_that_looks_at_it() -> None:
    core = make_core(order="deadline")
    with pytest.raises(DeadlinePassed, match=r"deadline: got -1.000 s from now; allowed: more"):
        core.submit(request("late", deadline_s=4.0), 5.0)
    assert core.statistics().refused == 1 and core.idle
    core.submit(request("late", deadline_s=6.0), 5.0)
    assert run(core, now_s=5.5) == ["late"]
    make_core(order="fcfs").submit(request("late", deadline_s=4.0), 5.0)


def test_what_slices_took_says_which_deadlines_cannot_be_met() -> None:
    """A step takes 0.1 s here: 20 tokens that must come take 2 s alone, of which half must fit."""
    core = make_core(order="deadline", slicing="adaptive")
    device, now_s = ScriptedExecutor(vocab_size=VOCAB), 0.0
    patient = dict(params=dict(max_tokens=200, min_tokens=20))
    core.submit(request("first", deadline_s=now_s + 0.01, **patient), now_s)  # nothing is known yet
    core.abort("first")
    turn = 0
    while turn < 300:
        if core.idle:
            core.submit(request(f"r{turn}", params=dict(max_tokens=1 + turn % 40)), now_s)
        turn += 1
        plan = core.next_slice(now_s)
        if plan is None:
            continue
        result = device.wait(device.dispatch(plan))
        result = replace(result, slice_s=0.1 * result.steps_run)
        now_s += result.slice_s
        core.complete(result, now_s)
    with pytest.raises(DeadlinePassed, match=r"got 0.500 s from now; allowed: more than (0.9|1.0)"):
        core.submit(request("late", deadline_s=now_s + 0.5, **patient), now_s)
    core.submit(request("in time", deadline_s=now_s + 1.2, **patient), now_s)
    core.submit(request("short", deadline_s=now_s + 0.5), now_s)


# ---------------------------------------------------------------------------------------- misfits


@pytest.mark.parametrize(("misfit", "first"), [("stop", "runs"), ("skip", "small")])
def test_a_small_request_goes_past_one_that_does_not_fit_on_wish(misfit, first) -> None:
    core = make_core(
        num_pages=16,
        admission="reserve_max",
        order="dlpm",
        order_options=("quantum=1000", f"misfit={misfit}"),
    )
    for name, tokens in (("runs", 60), ("large", 60), ("small", 8)):
        params = dict(max_tokens=2 if name == "small" else 16)
        core.submit(request(name, tokens, params=params), 0.0)
    ended = run(core)
    assert ended[0] == first and sorted(ended) == ["large", "runs", "small"]


def test_samples_that_find_no_rows_are_gone_past_on_wish() -> None:
    core = make_core(max_rows=3, order="dlpm", order_options=("misfit=skip",))
    core.submit(request("runs", params=dict(max_tokens=40)), 0.0)
    core.submit(request("wide", params=dict(n=3)), 0.0)
    core.submit(request("narrow"), 0.0)
    assert run(core)[:2] == ["narrow", "runs"]


@FEW
@given(
    options=st.tuples(
        st.sampled_from(["quantum=1", "quantum=20", "quantum=1000"]),
        st.sampled_from(["refill_when=end_of_pass", "refill_when=mid_pass"]),
        st.sampled_from(["refill_scope=queued", "refill_scope=queued_or_running"]),
        st.sampled_from(["misfit=stop", "misfit=skip"]),
        st.sampled_from(["max_skips=0", "max_skips=16"]),
        st.sampled_from(["charge_at=admit", "charge_at=enacted"]),
    ),
    num_pages=st.integers(14, 40),
    seed=st.integers(0, 10**6),
)
def test_everybody_is_served_under_every_setting_of_dlpm(options, num_pages, seed) -> None:
    rng = np.random.default_rng(seed)
    core = make_core(num_pages=num_pages, max_rows=4, order="dlpm", order_options=options)
    names = []
    for place in range(12):
        tokens = int(rng.integers(1, 60))
        prompt = (np.arange(tokens, dtype=np.int32) * int(rng.integers(1, 3))) % VOCAB
        keys = page_keys(prompt, page_size=8, scope="all", model="test")
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 30)), n=int(rng.integers(1, 3)), ignore_eos=True
        )
        core.submit(
            Request(
                request_id=f"r{place}",
                prompt=prompt,
                params=params,
                client=str(rng.choice(["a", "b"])),
                page_keys=tuple(keys),
                scope="all",
            ),
            0.0,
        )
        names += [f"r{place}"] * params.n
    assert sorted(run(core)) == sorted(names)


# ------------------------------------------------------------------------------------ free memory


@pytest.mark.parametrize(("gate", "first"), [("0", "runs"), ("0.5", "small")])
def test_a_small_request_goes_first_while_memory_is_short_on_wish(gate, first) -> None:
    core = make_core(
        num_pages=16,
        admission="reserve_max",
        order="larry",
        order_options=(f"kv_gate={gate}",),
    )
    for name, tokens, output in (("runs", 60, 40), ("large", 60, 16), ("small", 8, 2)):
        core.submit(request(name, tokens, params=dict(max_tokens=output)), 0.0)
    ended = run(core)
    assert ended[0] == first and sorted(ended) == ["large", "runs", "small"]


def test_cached_pages_that_nobody_reads_count_as_free() -> None:
    core = make_core(num_pages=16, max_rows=1, order="larry", order_options=("kv_gate=1",))
    keys = page_keys(request("first", 60).prompt, page_size=8, scope="all", model="test")
    core.submit(request("first", 60, page_keys=tuple(keys), scope="all"), 0.0)
    assert run(core) == ["first"] and core.pool.statistics().evictable
    core.submit(request("large", 60), 0.0)
    core.submit(request("small", 8), 0.0)
    assert run(core) == ["large", "small"]
