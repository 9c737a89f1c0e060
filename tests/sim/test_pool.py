"""A pool over instances on a virtual clock: counts, times, and that everybody ends once."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.scls_table import Case, cases, measure, profile_of
from jaxserve.engine.buckets import Buckets, make_buckets
from jaxserve.errors import ConfigError
from jaxserve.report.recorder import Recorder
from jaxserve.schedulers.estimators.bilinear import Bilinear, BilinearTime
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.schedulers.estimators.slice_time import NoisyTime
from jaxserve.sim.padded_static import PaddedSlice, padded_static
from jaxserve.sim.pool import PoolConfig, simulate_pool
from jaxserve.sim.pool_executors import Row, continuous_slice
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work, Workload

TIME = BilinearTime(Bilinear(1.0, 2.0, 3.0, 10.0), Bilinear(1.0, 1.0, 2.0, 5.0))
FEW = settings() if settings().max_examples > 100 else settings(max_examples=4)
POOLS = {
    "static": ("max_input=30", "max_output=20"),
    "scls": (),
    "scls_resident": (),
}


@dataclass(frozen=True)
class PerToken:
    """A second for each token that is computed, half a second of the host."""

    def slice_s(self, shape: SliceShape) -> float:
        return float(shape.prefill_tokens + shape.steps)

    def host_s(self, shape: SliceShape) -> float:
        return 0.5


class Log(Recorder):
    """All that was recorded, in the open."""

    def __init__(self) -> None:
        super().__init__()
        self.at_s: dict[int, list[float]] = {}
        self.tokens: Counter[int] = Counter()
        self.reasons: dict[int, str] = {}
        self.batches: list[dict[str, Any]] = []

    def sent(self, work: Work, at_s: float) -> None:
        super().sent(work, at_s)
        self.at_s[work.number] = [at_s]

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        super().delivered(number, at_s, num_tokens)
        assert number not in self.reasons and at_s >= self.at_s[number][-1] and num_tokens > 0
        self.at_s[number].append(at_s)
        self.tokens[number] += num_tokens

    def ended(self, number: int, at_s: float, reason: str, cached_tokens: int, **known: Any):
        super().ended(number, at_s, reason, cached_tokens, **known)
        assert number not in self.reasons and at_s >= self.at_s[number][-1]
        self.at_s[number].append(at_s)
        self.reasons[number] = reason

    def slice(self, replica: int, begin_s: float, end_s: float, **counts: int) -> None:
        super().slice(replica, begin_s, end_s, **counts)
        self.batches.append({"replica": replica, "begin_s": begin_s, "end_s": end_s, **counts})

    def total(self, name: str) -> int:
        return sum(each[name] for each in self.batches)


def work(number: int, prompt: int, output: int, most: int | None = None, **changed) -> Work:
    fields: dict[str, Any] = {"arrival_s": 0.0, **changed}
    return Work(
        number=number,
        prompt_tokens=prompt,
        output_tokens=output,
        max_tokens=output if most is None else most,
        **fields,
    )


def feed_of(*requests: Work) -> Feed:
    return Feed(Workload(name="w", requests=lambda: iter(requests), num_requests=len(requests)))


def config(pool: str = "scls", *options: str, **changed) -> PoolConfig:
    fields: dict[str, Any] = {
        "memory": KvMemory(100, 2, 1),
        "estimate": TIME,
        "replicas": 2,
        "slice_len": 4,
        "slice_time": PerToken(),
        **changed,
    }
    return PoolConfig(pool=pool, pool_options=(*POOLS[pool], *options), **fields)


def noisy(pool: str, seed: int = 0, **changed) -> PoolConfig:
    time = NoisyTime(PerToken(), spread=0.3, seed=seed)
    return config(pool, slice_time=time, padded_time=PaddedSlice(time), **changed)


def run(pool_config: PoolConfig, *requests: Work) -> Log:
    log = Log()
    simulate_pool(feed_of(*requests), pool_config, log)
    return log


# ------------------------------------------------------------------------------------ executors


def test_a_padded_batch_runs_until_all_members_have_finished() -> None:
    rows = [Row(5, 2, True), Row(2, 3, True), Row(12, 1, True)]
    ran = padded_static(rows, 8, TIME)
    assert (ran.steps, ran.made) == (3, (2, 3, 1)) and ran.seconds == TIME.slice_s(3, 12, 3)
    assert (ran.prefill_tokens, ran.pad_tokens, ran.invalid_tokens) == (19, 7 + 10, 1 + 2)
    cut = padded_static(rows, 2, TIME)
    assert (cut.steps, cut.made, cut.invalid_tokens) == (2, (2, 2, 1), 1)


def test_a_continuous_slice_pads_nothing() -> None:
    ran = continuous_slice([Row(5, 2, True), Row(7, 9, False)], 3, PerToken())
    assert (ran.steps, ran.made) == (3, (2, 3)) and ran.seconds == 5 + 3 + 0.5
    assert (ran.prefill_tokens, ran.pad_tokens, ran.invalid_tokens) == (5, 0, 0)
    seen = []

    class Sees(PerToken):
        def slice_s(self, shape: SliceShape) -> float:
            seen.append(shape)
            return 1.0

    continuous_slice([Row(5, 2, True), Row(7, 9, False)], 3, Sees())
    assert seen == [SliceShape(3, 2, 6 + (7 + 8 + 9), 5, 1 + 2 + 3 + 4 + 5)]


def test_a_continuous_slice_runs_in_the_engines_programs() -> None:
    seen = []

    class Sees(PerToken):
        def slice_s(self, shape: SliceShape) -> float:
            seen.append((shape.rows, shape.prefill_tokens))
            return 1.0

    buckets = Buckets(make_buckets(16, 4), tile=8)
    for prompts in ([5, 9], [30, 30], []):
        rows = [Row(length, 2, True) for length in prompts] + [Row(7, 9, False)]
        continuous_slice(rows, 3, Sees(), buckets)
    assert seen == [(16, 4 * 8), (8, 2 * 4 * 8), (1, 0)]


def test_a_padded_batch_takes_what_its_device_takes() -> None:
    seen = []

    class Sees(PerToken):
        def slice_s(self, shape: SliceShape) -> float:
            seen.append(shape)
            return 1.0

    assert PaddedSlice(Sees()).slice_s(2, 5, 3) == 1.0 + 0.5
    # The first of three tokens comes from the prompts; then rows attend to 6 and 7.
    assert seen == [SliceShape(3, 2, 2 * (6 + 7), 2 * 5, 2 * (1 + 2 + 3 + 4 + 5))]


def test_nobody_left_takes_no_time() -> None:
    for ran in (
        padded_static([Row(0, 0, False)], 4, TIME),
        continuous_slice([Row(0, 0, False)], 4, PerToken()),
    ):
        assert (ran.steps, ran.seconds, ran.made) == (0, 0.0, (0,))


# ----------------------------------------------------------------------------------- simulation


def test_a_request_is_computed_again_each_slice() -> None:
    log = run(config(replicas=1), work(0, 6, 10))
    ends = [TIME.slice_s(1, 6, 4), TIME.slice_s(1, 10, 4), TIME.slice_s(1, 14, 2)]
    assert log.at_s[0] == [0.0, ends[0], sum(ends[:2]), sum(ends), sum(ends)]
    assert log.tokens[0] == 10 and log.reasons[0] == "length"
    counters = log.replicas[0]
    assert counters["recomputed_prefill_tokens"] == 10 + 14 and counters["slices_per_request"] == 3
    assert counters["busy_s"] == sum(ends) and counters["estimator_error"] == 0


def test_a_resident_request_is_computed_once() -> None:
    log = run(config("scls_resident"), work(0, 6, 10, 40))
    assert [each["prefill_tokens"] for each in log.batches] == [6, 0, 0]
    assert log.at_s[0][-1] == 6 + 10 + 3 * 0.5 and log.reasons[0] == "stop"


def test_a_static_batch_waits_for_its_longest() -> None:
    log = run(config("static"), work(0, 6, 3, 20), work(1, 4, 9, 20))
    (batch,) = log.batches
    assert (batch["steps"], batch["pad_tokens"], batch["invalid_tokens"]) == (9, 2, 6)
    assert log.at_s[0][-1] == log.at_s[1][-1] == TIME.slice_s(2, 6, 9)
    assert log.replicas[0]["early_returns"] == 1  # 20 steps were asked for


lengths = st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 5))
moments = st.none() | st.floats(0, 3000)


@pytest.mark.parametrize("pool", POOLS)
@FEW
@given(
    requests=st.lists(st.tuples(lengths, st.floats(0, 2000), moments, moments), max_size=15),
    replicas=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_everybody_ends_once(pool: str, requests: list, replicas: int, seed: int) -> None:
    arrivals = sorted(arrival_s for _, arrival_s, _, _ in requests)
    sent = [
        work(
            number,
            prompt,
            output,
            min(20, output + more),
            arrival_s=arrivals[number],
            abort_s=abort_s,
            deadline_s=deadline_s,
        )
        for number, ((prompt, output, more), _, abort_s, deadline_s) in enumerate(requests)
    ]
    runs = [run(noisy(pool, seed, replicas=replicas), *sent) for _ in range(2)]
    log = runs[0]
    assert log.reasons.keys() == {each.number for each in sent}
    for each in sent:
        served = log.reasons[each.number] in ("stop", "length")
        if served:
            assert log.tokens[each.number] == each.output_tokens
            assert (log.reasons[each.number] == "length") == (each.output_tokens == each.max_tokens)
        else:
            assert log.tokens[each.number] <= each.output_tokens
            moment = each.abort_s if log.reasons[each.number] == "abort" else each.deadline_s
            assert moment is not None
            assert log.at_s[each.number][-1] == pytest.approx(each.arrival_s + moment)
    assert log.total("output_tokens") == sum(log.tokens.values())
    assert log.total("pad_tokens") == sum(it["pad_tokens"] for it in log.replicas.values())
    for name in ("tokens", "reasons", "at_s", "batches", "replicas"):
        assert getattr(log, name) == getattr(runs[1], name)


def test_who_can_never_fit_is_refused_and_the_rest_served() -> None:
    why: list[str] = []
    log = Log()
    requests = work(0, 500, 4), work(1, 5, 4)
    simulate_pool(feed_of(*requests), config(), log, on_refusal=why.append)
    assert log.reasons == {0: "refused", 1: "length"}
    (text,) = why
    assert text.startswith("request 0: got 500 prompt tokens and 4 to make, for which 504 must fit")


def test_planners_never_see_what_a_request_will_make() -> None:
    starts = []
    for output in (1, 20):
        log = run(noisy("static"), *(work(n, 3 + n, output, 20) for n in range(20)))
        first = [each for each in log.batches if each["begin_s"] == 0]
        starts.append([(each["replica"], each["rows"], each["prefill_tokens"]) for each in first])
    assert starts[0] == starts[1]


def test_a_wrong_estimate_is_refined() -> None:
    half = BilinearTime(
        *(
            Bilinear(*(value / 2 for value in dataclasses.astuple(model)))
            for model in (TIME.prefill, TIME.decode)
        )
    )
    errors = {}
    for refine in ("false", "true"):
        truth = config("scls", f"refine={refine}", estimate=half, padded_time=TIME, replicas=1)
        log = run(truth, *(work(n, 3 + n % 9, 9, arrival_s=400.0 * n) for n in range(40)))
        errors[refine] = log.replicas[0]["estimator_error"]
    assert errors["false"] == pytest.approx(0.5) and errors["true"] < 0.1


def test_who_waits_for_the_simulation_hears_how_far_it_is() -> None:
    heard: list[tuple[int, float]] = []
    requests = [work(n, 6, 4, arrival_s=1000.0 * n) for n in range(3)]

    def tick(num_ended: int, now_s: float) -> None:
        heard.append((num_ended, now_s))

    simulate_pool(feed_of(*requests), config(), Log(), tick=tick)
    assert heard == sorted(heard) and heard[0][0] == 0 and heard[-1][0] == 3


class OneAtATime(Feed):
    """The next request is sent a second after one has ended."""

    def __init__(self, requests: list[Work]):
        self._left, self._due = requests, 0.0

    def next_s(self) -> float | None:
        return self._due if self._left else None

    def take(self, now_s: float) -> list[tuple[float, Work]]:
        if not self._left or self._due is None or self._due > now_s:
            return []
        due, self._due = self._due, float("inf")
        return [(due, self._left.pop(0))]

    def ended(self, work: Work, now_s: float) -> None:
        self._due = now_s + 1


def test_a_closed_loop_is_fed_by_ends() -> None:
    log = Log()
    simulate_pool(OneAtATime([work(n, 6, 4) for n in range(3)]), config(), log)
    took = TIME.slice_s(1, 6, 4)
    assert [log.at_s[n][0] for n in range(3)] == [0.0, took + 1, 2 * took + 2]


@pytest.mark.parametrize(
    ("pool", "changed", "message"),
    [
        ("scls", {"replicas": 0}, "replicas: got 0; allowed: 1 to 10000"),
        ("scls_resident", {"slice_time": None}, "slice_time: got None; allowed: a time of slices"),
        ("scls", {"estimate": BilinearTime(Bilinear(0.0, 0.0, -1.0, 9.0), TIME.decode)}, None),
        ("static", {"memory": KvMemory(4, 2, 1)}, "the KV memory of an instance under zeta"),
    ],
)
def test_what_cannot_run_is_refused_before_it_runs(
    pool: str, changed: dict, message: str | None
) -> None:
    if message is None:
        changed |= {"slice_len": 1}
        message = "falls as slices get longer"
        falling = Bilinear(0.0, 0.0, -9.0, 0.0)
        changed["estimate"] = BilinearTime(falling, falling)
    with pytest.raises(ConfigError, match=message):
        config(pool, **changed)


# ---------------------------------------------------------------------------------- the table


def test_the_table_in_small() -> None:
    outputs = [150 if number % 10 == 0 else 10 for number in range(400)]
    requests = [work(n, 50 + 37 * n % 900, output, 1024) for n, output in enumerate(outputs)]
    workload = Workload(name="made", requests=lambda: iter(requests), num_requests=400)
    profile = profile_of(noise=0.05)
    names = ("sls", "ils", "scls lb", "scls_resident")
    assert set(names) <= {case.name for case in cases([128])}
    lines = {name: measure(Case(name, 64), {0: workload}, profile) for name in names}
    speed = {name: line["requests_per_s"] for name, line in lines.items()}
    assert speed["sls"] < speed["scls lb"] < min(speed["ils"], speed["scls_resident"])
    assert lines["sls"]["invalid_per_request"] > lines["scls lb"]["invalid_per_request"] > 0
    assert lines["scls_resident"]["pad_per_request"] == lines["ils"]["pad_per_request"] == 0
    # Steps are delivered one by one only where they run one by one.
    assert lines["ils"]["gap_p99_s"] < 0.2 < lines["scls lb"]["gap_p99_s"]


def test_a_slower_engine_is_slower_by_the_same_in_every_step() -> None:
    fast, slow = profile_of(), profile_of(overhead_s=0.02)
    shape = SliceShape(10, 4, 4 * 10 * 100, 400)
    assert slow.time.slice_s(shape) - fast.time.slice_s(shape) == pytest.approx(10 * 0.02)
    estimates = [each.bilinear.slice_s(4, 100, 9) for each in (fast, slow)]
    assert estimates[1] - estimates[0] == pytest.approx(10 * 0.02)
