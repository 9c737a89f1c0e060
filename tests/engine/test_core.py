"""The core against the scripted device: every request ends once, with the tokens it should have."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.errors import BadRequest, QueueFull
from jaxserve.request import Delta, FinishReason, Limits, Request, SamplingParams
from jaxserve.schedulers.catalog import ADMISSIONS, ORDERS, VICTIMS
from jaxserve.schedulers.prefix_tree import page_keys

VOCAB, CONTEXT, EOS = 97, 256, 13


def make_core(*, num_pages: int = 200, page_size: int = 8, **scheduler) -> EngineCore:
    defaults = dict(max_rows=8, max_prefill_tokens=32, slice_steps=8)
    return EngineCore(
        CoreConfig(
            limits=Limits(vocab_size=VOCAB, max_context=CONTEXT, max_samples=4),
            model_key="test",
            num_pages=num_pages,
            page_size=page_size,
            tile=8,
            scheduler=SchedulerConfig(**{**defaults, **scheduler}),
        )
    )


def make_request(name: str, prompt, **params) -> Request:
    tokens = np.array(prompt, np.int32)
    params = {"max_tokens": 10, "ignore_eos": True, **params}
    priority = params.pop("priority", 0)
    deadline_s = params.pop("deadline_s", None)
    client = params.pop("client", "anonymous")
    keys = page_keys(tokens, page_size=8, scope="all", model="test")
    return Request(
        request_id=name,
        prompt=tokens,
        params=SamplingParams(**params),
        client=client,
        page_keys=tuple(keys),
        scope="all",
        priority=priority,
        deadline_s=deadline_s,
    )


def expected(request: Request) -> list[int]:
    """What the scripted device makes of a request that runs to its end."""
    token, made = int(request.prompt[-1]), []
    stops = set(request.params.stop_token_ids)
    if not request.params.ignore_eos:
        stops.add(EOS)
    while len(made) < (request.params.max_tokens or 0):
        token = (token + 1) % VOCAB
        while len(made) < request.params.min_tokens and token in stops:
            token = (token + 1) % VOCAB
        made.append(token)
        if token in stops:
            break
    return made


class Harness:
    """Drives a core and the scripted device in one thread, checking pages after every move."""

    def __init__(self, core: EngineCore):
        self.core = core
        self.device = ScriptedExecutor(vocab_size=VOCAB, eos_token_ids=(EOS,))
        self.now_s = 0.0
        self.flights = []
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finish: dict[tuple[str, int], Delta] = {}

    def submit(self, request: Request) -> None:
        self.core.submit(request, self.now_s)

    def dispatch(self) -> bool:
        plan = self.core.next_slice(self.now_s)
        self.collect()
        if plan is None:
            return False
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot planned twice"
        exclusive = [page for row in plan.rows for page in row.pages]
        assert all(0 <= page < self.core.pool.num_pages for page in exclusive)
        self.flights.append(self.device.dispatch(plan))
        return True

    def parse(self) -> bool:
        if not self.flights:
            return False
        result = self.device.wait(self.flights.pop(0))
        self.now_s += result.slice_s
        self.core.complete(result, self.now_s)
        self.collect()
        return True

    def collect(self) -> None:
        self.core.pool.check()
        for delta in self.core.take_deltas():
            key = (delta.request_id, delta.sample)
            assert key not in self.finish, f"{key} ended twice"
            self.tokens.setdefault(key, []).extend(delta.tokens)
            if delta.finish is not None:
                self.finish[key] = delta

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            dispatched = self.dispatch()
            if not dispatched and not self.parse():
                assert self.core.idle, "nothing to run, and not idle"
                return
        raise AssertionError(f"not idle after {limit} moves")


def assert_all_pages_back(core: EngineCore) -> None:
    statistics = core.pool.statistics()
    assert statistics.leased == 0 and statistics.retiring == 0, statistics
    core.pool.clear_cache()
    assert core.pool.statistics().free == core.pool.num_pages


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("slicing", ["sequence", "iteration", "fixed", "adaptive"])
@pytest.mark.parametrize("admission", ADMISSIONS)
def test_every_rule_serves_everyone_exactly(slicing: str, admission: str, overlap: bool) -> None:
    core = make_core(slicing=slicing, admission=admission, overlap=overlap)
    harness, rng = Harness(core), np.random.default_rng(7)
    requests = [
        make_request(
            f"r{i}",
            rng.integers(0, VOCAB, rng.integers(1, 60)),
            max_tokens=int(rng.integers(1, 40)),
            ignore_eos=bool(i % 2),
        )
        for i in range(12)
    ]
    for request in requests:
        harness.submit(request)
    harness.run()
    for request in requests:
        assert harness.tokens[request.request_id, 0] == expected(request)
    assert_every_slice_and_request_was_observed(core)
    assert_all_pages_back(core)


def assert_every_slice_and_request_was_observed(core: EngineCore) -> None:
    now = core.statistics()
    assert now.slice_steps.count == now.slice_seconds.count == now.slices
    assert (now.slice_steps.sum, now.scheduling_seconds.count) == (now.steps, now.slices)
    assert now.request_queue_time_seconds.count == now.received
    assert now.request_prefill_time_seconds.count == now.received
    assert now.request_decode_time_seconds.count == now.finished
    # What is neither idle nor an output token is a step that only ran a part of a prompt.
    prompt_steps = now.row_steps - now.slice_idle_row_steps - now.output_tokens
    assert now.slice_idle_row_steps >= 0 and 0 <= prompt_steps <= now.prefill_tokens


def test_rows_that_outgrow_the_pool_are_preempted_and_recomputed() -> None:
    core = make_core(num_pages=30, admission="reserve_prompt", slice_steps=4)
    harness = Harness(core)
    requests = [make_request(f"r{i}", [i] * 17, max_tokens=70) for i in range(6)]
    for request in requests:
        harness.submit(request)
    harness.run()
    for request in requests:
        assert harness.tokens[request.request_id, 0] == expected(request)
    assert core.statistics().preemptions > 0
    assert core.statistics().recomputed_tokens > 0
    assert_every_slice_and_request_was_observed(core)
    assert_all_pages_back(core)


def test_statistics_stay_as_they_were_when_asked_for() -> None:
    core = make_core()
    harness, before = Harness(core), core.statistics()
    harness.submit(make_request("r", [1, 2]))
    harness.run()
    assert before.slices == before.slice_steps.count == 0
    assert core.statistics().slices == core.statistics().slice_steps.count > 0


def test_a_preemption_makes_the_ratio_rule_careful() -> None:
    core = make_core(num_pages=30, admission="ratio", slice_steps=4)
    harness = Harness(core)
    for i in range(3):
        harness.submit(make_request(f"r{i}", [i] * 17, max_tokens=40))
    harness.dispatch()
    harness.parse()
    before = core.admission.rho
    core.preempt(core.jobs[core.order.running()[-1]])
    assert core.admission.rho != before
    harness.run()
    assert_all_pages_back(core)


def test_a_lone_row_that_outgrows_the_pool_ends_and_says_why() -> None:
    core = make_core(num_pages=4, admission="reserve_prompt", slice_steps=4)
    harness = Harness(core)
    harness.submit(make_request("big", [1] * 9, max_tokens=100))
    harness.run()
    finish = harness.finish["big", 0]
    assert finish.finish is FinishReason.LENGTH and "4 pages" in finish.message
    assert len(harness.tokens["big", 0]) == 4 * 8 - 9 + 1
    assert_all_pages_back(core)


def test_samples_share_the_prompt_and_end_one_by_one() -> None:
    core = make_core()
    harness = Harness(core)
    request = make_request("n", list(range(20)), n=3, max_tokens=12)
    harness.submit(request)
    harness.run()
    assert {key: tokens for key, tokens in harness.tokens.items()} == {
        ("n", sample): expected(request) for sample in range(3)
    }
    assert_all_pages_back(core)


def test_a_cached_prompt_is_not_run_again() -> None:
    core = make_core()
    harness = Harness(core)
    for name in ("first", "second"):
        harness.submit(make_request(name, list(range(40)), max_tokens=4))
        harness.run()
    # 39 tokens may be cached, the last runs again: 4 whole pages of 8
    assert harness.finish["second", 0].cached_tokens == 32
    assert core.statistics().prefill_tokens == 40 + 8


def test_each_client_is_credited_with_what_was_run_for_it() -> None:
    """Two clients with one prompt of 40 tokens and 4 of output each, at 2 and 3 a token."""
    for order, options, credits in (
        ("dlpm", ("quantum=50", "w_in=2", "w_out=3"), (8.0, 22.0)),
        ("vtc", ("w_in=2", "w_out=3"), (None, None)),
    ):
        core = make_core(order=order, order_options=options)
        harness = Harness(core)
        for name in ("ann", "bob"):
            request = make_request(name, list(range(40)), max_tokens=4, client=name)
            harness.submit(request)
            harness.run()
        ann, bob = sorted(core.meter.clients(), key=lambda client: client.client)
        assert (ann.computed, ann.cached, ann.output) == (40, 0, 4)
        assert (bob.computed, bob.cached, bob.output) == (8, 32, 4)
        assert (ann.service, ann.service_uncached) == (92, 92)
        assert (bob.service, bob.service_uncached) == (92, 28)
        # A quantum each: 50 - 92, and a second one that came with the other's; 50 - 28.
        assert (ann.credit, bob.credit) == credits


@pytest.mark.parametrize("order", ["fcfs", "dlpm", "vtc"])
def test_a_recomputed_prompt_is_served_once(order: str) -> None:
    core = make_core(num_pages=30, admission="reserve_prompt", slice_steps=4, order=order)
    harness = Harness(core)
    for i in range(6):
        harness.submit(make_request(f"r{i}", [i] * 17, max_tokens=70, client=f"c{i % 2}"))
    harness.run()
    assert core.statistics().recomputed_tokens > 0
    for client in core.meter.clients():
        assert (client.computed, client.cached, client.output) == (3 * 17, 0, 3 * 70)


def test_output_pages_are_found_by_the_next_turn() -> None:
    core = make_core()
    harness = Harness(core)
    first = make_request("first", list(range(10)), max_tokens=30)
    harness.submit(first)
    harness.run()
    turn = [*range(10), *expected(first), 5, 5]
    harness.submit(make_request("second", turn, max_tokens=2))
    harness.run()
    assert harness.finish["second", 0].cached_tokens == 32  # of 39 computed tokens


def test_priority_goes_first_and_fcfs_does_not_care() -> None:
    for order, first in (("priority", "urgent"), ("fcfs", "early")):
        core = make_core(order=order, max_rows=1)
        harness = Harness(core)
        harness.submit(make_request("early", [1, 2], priority=5))
        harness.submit(make_request("urgent", [3, 4], priority=-5))
        harness.run()
        assert next(iter(harness.finish))[0] == first


def test_a_passed_deadline_ends_a_request_waiting_or_running() -> None:
    core = make_core(max_rows=1, slicing="iteration")
    harness = Harness(core)
    harness.submit(make_request("runs", [1], max_tokens=100, deadline_s=0.02))
    harness.submit(make_request("waits", [1], max_tokens=5, deadline_s=0.01))
    harness.submit(make_request("stays", [1], max_tokens=5))
    harness.run()
    assert harness.finish["runs", 0].finish is FinishReason.DEADLINE
    assert harness.finish["waits", 0].finish is FinishReason.DEADLINE
    assert harness.finish["stays", 0].finish is FinishReason.LENGTH
    assert_all_pages_back(core)


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    core = make_core(max_waiting=2)
    for i in range(2):
        core.submit(make_request(f"r{i}", [1]), 0.0)
    with pytest.raises(QueueFull, match="--max_waiting=2.*try again in"):
        core.submit(make_request("r2", [1]), 0.0)


def test_waiting_too_long_ends_in_the_queue_time_out() -> None:
    core = make_core(max_rows=1, queue_timeout_s=0.05, slicing="iteration", overlap=False)
    harness = Harness(core)
    harness.submit(make_request("runs", [1], max_tokens=100))
    harness.submit(make_request("waits", [2], max_tokens=5))
    harness.run()
    assert harness.finish["runs", 0].finish is FinishReason.LENGTH
    assert harness.finish["waits", 0].finish is FinishReason.DEADLINE
    assert "queue_timeout_s" in harness.finish["waits", 0].message


def test_a_stop_string_match_cuts_what_came_after_it() -> None:
    core = make_core(slicing="fixed", slice_steps=8)
    harness = Harness(core)
    harness.submit(make_request("s", list(range(10)), max_tokens=64))
    harness.dispatch()
    harness.parse()
    assert core.abort("s", reason=FinishReason.STOP, keep_tokens=3)
    harness.run()
    assert harness.finish["s", 0].finish is FinishReason.STOP
    # 10 prompt and 3 output tokens count, the newest has no key and value: one whole page of 8
    assert core.pool.statistics().cached == 1


def test_what_came_after_a_stop_string_is_not_charged() -> None:
    core = make_core(slicing="fixed", slice_steps=8, order="dlpm", order_options=("quantum=100",))
    harness = Harness(core)
    harness.submit(make_request("s", list(range(10)), max_tokens=64, client="c"))
    harness.dispatch()
    harness.parse()
    assert core.meter.clients()[0].output == 8
    core.abort("s", reason=FinishReason.STOP, keep_tokens=3)
    harness.run()
    (served,) = core.meter.clients()
    assert (served.computed, served.output, served.credit) == (10, 3, 100 - 10 - 2 * 3)
    assert core.statistics_now.output_tokens == 3


def test_who_memory_keeps_out_is_no_reason_for_short_slices() -> None:
    core = make_core(num_pages=12, slicing="adaptive", slice_steps=16)
    harness, steps = Harness(core), []
    for number in range(12):
        harness.submit(make_request(f"r{number}", [number] * 20, max_tokens=40))
    for _ in range(30):
        plan = core.next_slice(harness.now_s)
        if plan is not None:
            harness.flights.append(harness.device.dispatch(plan))
            if plan.num_prefill_tokens == 0 and core.statistics_now.waiting:
                steps.append(plan.steps)
        harness.parse()
    assert sum(each > 1 for each in steps) > len(steps) / 2 > 2


def test_samples_that_gave_way_come_back_where_they_just_fit() -> None:
    core = make_core(num_pages=30, slicing="fixed", slice_steps=4, overlap=False)
    harness = Harness(core)
    request = make_request("four", list(range(1, 66)), n=4, max_tokens=20)
    harness.submit(request)
    for _ in range(5):
        harness.dispatch()
        harness.parse()
    core.preempt(core.jobs[1])
    assert core.statistics_now.preemptions == 1 and core.jobs[1].sequences[0].made
    harness.run()
    for sample in range(4):
        assert harness.tokens["four", sample] == expected(request)


def test_what_fitted_before_says_nothing_of_several_samples() -> None:
    core = make_core(num_pages=5, admission="reserve_prompt", watermark_pages=0)
    short = make_request("short", list(range(8)), n=4, max_tokens=8)
    with pytest.raises(BadRequest, match="KV pool"):
        core.submit(short, 0.0)
    core.submit(make_request("longer", list(range(9)), n=4, max_tokens=8), 0.0)
    with pytest.raises(BadRequest, match="KV pool"):
        core.submit(short, 0.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(BadRequest, match="weight"):
        make_core().submit(replace(make_request("r", [1]), weight=weight), 0.0)


def test_what_can_never_run_is_refused() -> None:
    core = make_core(num_pages=4, admission="reserve_max")
    with pytest.raises(BadRequest, match="KV pool of 32 tokens"):
        core.submit(make_request("r", [1] * 20, max_tokens=20), 0.0)
    core.submit(make_request("twin", [1]), 0.0)
    with pytest.raises(BadRequest, match="request_id.*not in use"):
        core.submit(make_request("twin", [1]), 0.0)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_pages=st.integers(12, 80),
    slicing=st.sampled_from(["iteration", "fixed", "adaptive"]),
    admission=st.sampled_from(list(ADMISSIONS)),
    order=st.sampled_from(list(ORDERS)),
    victim=st.sampled_from(list(VICTIMS)),
    overlap=st.booleans(),
)
def test_no_page_is_lost_whatever_happens(
    seed: int, num_pages: int, slicing: str, admission: str, order: str, victim: str, overlap: bool
) -> None:
    """Random arrivals, forks, aborts, row limits, preemptions and finishes, in any interleaving."""
    rng = np.random.default_rng(seed)
    core = make_core(
        num_pages=num_pages,
        slicing=slicing,
        admission=admission,
        order=order,
        order_options=ORDERS[order].tight,
        victim=victim,
        overlap=overlap,
    )
    harness, requests, aborted = Harness(core), {}, set()
    for i in range(60):
        match rng.integers(0, 8):
            case 0 | 1 | 2:
                request = make_request(
                    f"r{i}",
                    rng.integers(0, 3, rng.integers(1, 50)),
                    max_tokens=int(rng.integers(1, 50)),
                    n=int(rng.integers(1, 4)),
                    priority=int(rng.integers(0, 3)),
                    client=str(rng.choice(["a", "b", "c"])),
                )
                try:
                    harness.submit(request)
                    requests[request.request_id] = request
                except BadRequest:
                    pass
            case 3 if requests:
                name = str(rng.choice(list(requests)))
                sample = int(rng.integers(-1, 3))
                if core.abort(name, sample=sample):
                    aborted.add(name)
                harness.collect()
            case 4 if requests:
                name = str(rng.choice(list(requests)))
                core.limit_row(name, 0, int(rng.integers(0, 3)))
            case 5:
                harness.parse()
            case _:
                harness.dispatch()
        waiting = list(core.order.waiting())
        assert sorted([*waiting, *core.order.running()]) == sorted(core.jobs)
        if order == "lpm":  # what it knows of the cache is what the pool has
            match = core.prefixes.num_cached
            assert waiting == sorted(waiting, key=lambda n: (-match(core.jobs[n]), n))
    harness.run()
    for name, request in requests.items():
        for sample in range(request.params.n):
            finish = harness.finish[name, sample]
            whole = expected(request)
            if finish.finish is FinishReason.LENGTH and not finish.message:
                assert harness.tokens[name, sample] == whole
            else:
                assert name in aborted or finish.message
                assert harness.tokens[name, sample] == whole[: len(harness.tokens[name, sample])]
    if "never_preempts" in ADMISSIONS[admission].laws:
        assert not core.statistics().preemptions
    assert_all_pages_back(core)


@pytest.mark.parametrize(
    ("victim", "first"), [("order", "b"), ("newest", "c"), ("fewest_made", "a")]
)
def test_who_gives_way_is_up_to_the_victim_rule(victim: str, first: str) -> None:
    core = make_core(
        num_pages=15,
        admission="reserve_prompt",
        order="priority",
        slicing="fixed",
        victim=victim,
    )
    preempted: list[str] = []
    preempt = core.preempt

    def watched(job) -> None:
        preempted.append(job.request.request_id)
        preempt(job)

    core.preempt = watched
    harness = Harness(core)
    # "c" is the most urgent and starts first; "a" and "b" start in the next slice, "b" ranks last.
    requests = [
        make_request("a", [1] * 30, max_tokens=60, priority=5),
        make_request("b", [2] * 2, max_tokens=60, priority=9),
        make_request("c", [3] * 17, max_tokens=60, priority=1),
    ]
    for request in requests:
        harness.submit(request)
    harness.run()
    assert preempted[0] == first
    for request in requests:
        assert harness.tokens[request.request_id, 0] == expected(request)
    assert_all_pages_back(core)


@pytest.mark.parametrize("victim", VICTIMS)
def test_one_request_always_runs_on(victim: str) -> None:
    core = make_core(num_pages=14, admission="reserve_prompt", victim=victim)
    harness = Harness(core)
    for i in range(4):
        harness.submit(make_request(f"r{i}", [i] * 9, max_tokens=100))
    harness.run()
    assert core.statistics().preemptions
    assert all(len(harness.tokens[f"r{i}", 0]) == 100 for i in range(4))


def test_past_future_lets_in_by_what_ended_before() -> None:
    def running_at_once(*outputs: int) -> int:
        core = make_core(num_pages=24, admission="past_future", max_prefill_tokens=256)
        harness = Harness(core)
        for i, output in enumerate(outputs):  # the device counts up from the last prompt token
            params = {"max_tokens": 90, "stop_token_ids": (40,)}
            harness.submit(make_request(f"h{i}", [40 - output], **params))
            harness.run()
        for i in range(8):
            harness.submit(make_request(f"r{i}", [50 + i] * 8, max_tokens=90))
        harness.dispatch()
        return len(core.order.running())

    assert running_at_once(*[4] * 2) == 8
    assert running_at_once(*[30] * 2) == 4
    assert running_at_once() == 1


def test_past_future_fills_the_pool_and_loses_no_work() -> None:
    """Requests that may make 90 tokens and stop after 20 in the mean, as the history can tell."""
    outputs = np.random.default_rng(0).lognormal(2.8, 0.6, 36).clip(1, 90).astype(int)

    def run(admission: str):
        core = make_core(
            num_pages=35,
            admission=admission,
            slicing="fixed",
            slice_steps=4,
            max_rows=32,
            max_prefill_tokens=256,
        )
        harness = Harness(core)
        for i, output in enumerate(outputs):
            last = int(i * 7 % VOCAB)
            stop = (last + int(output)) % VOCAB
            prompt = [*[i] * 20, last]
            harness.submit(make_request(f"r{i}", prompt, max_tokens=90, stop_token_ids=(stop,)))
        harness.run()
        return core.statistics()

    past_future, peak, reserve_prompt = map(run, ("past_future", "peak", "reserve_prompt"))
    assert past_future.steps < 0.5 * peak.steps
    assert past_future.preemptions == peak.preemptions == 0 < reserve_prompt.recomputed_tokens
