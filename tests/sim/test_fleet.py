"""Simulated fleets: nothing is lost, the same run is the same, and what is changed shows."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.models.profile import Profile, find_profile
from jaxserve.report.recorder import Recorder
from jaxserve.schedulers.catalog import ROUTINGS
from jaxserve.sim.run import Deployment, simulate
from jaxserve.sim_config import SimConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.generators import generate
from jaxserve.workload.work import Work, Workload

H200 = find_profile("h200-llama3-8b-bf16")


def deployment(
    *, profile: Profile = H200, num_pages: int = 400, scheduler: dict | None = None, **sim
) -> Deployment:
    cache = CacheConfig(page_size=64, num_pages=num_pages)
    engine = EngineConfig(cache=cache, scheduler=SchedulerConfig(**(scheduler or {})))
    return Deployment(engine=engine, sim=SimConfig(**sim), profile=profile)


def run(workload: Workload, deployed: Deployment, **feed) -> Recorder:
    recorder = Recorder()
    simulate(workload, Feed(workload, **feed), deployed, recorder)
    return recorder


def mix(num_requests: int = 12, seed: int = 0) -> Workload:
    return generate("fair_mix", ("clients=3",), num_requests=num_requests, seed=seed)


def of(*works: Work) -> Workload:
    return Workload(name="test", requests=lambda: iter(works), num_requests=len(works))


def work(number: int, **fields) -> Work:
    defaults = dict(arrival_s=0.0, prompt_tokens=100, output_tokens=50, max_tokens=50)
    return Work(number=number, **{**defaults, **fields})


def delivered(recorder: Recorder) -> Counter:
    tokens: Counter = Counter()
    for number, _, count in zip(*recorder.delivered_columns(), strict=True):
        tokens[int(number)] += int(count)
    return tokens


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_serves_every_request(routing: str) -> None:
    workload = mix()
    recorder = run(workload, deployment(replicas=3, routing=routing, blind=True))
    lengths = {each.number: each.output_tokens for each in workload.requests()}
    assert delivered(recorder) == lengths
    assert Counter(number for number, *_ in recorder.ends) == Counter(dict.fromkeys(lengths, 1))


@given(
    fail=st.lists(
        st.tuples(st.integers(0, 2), st.floats(0.01, 3.0), st.none() | st.floats(3.1, 6.0)),
        max_size=4,
    ),
    aborts=st.dictionaries(st.integers(0, 11), st.floats(0.0, 2.0), max_size=8),
    deadlines=st.dictionaries(st.integers(0, 11), st.floats(0.01, 2.0), max_size=8),
    routing=st.sampled_from(["d2lpm", "least_load", "cache_aware"]),
    delay=st.sampled_from([0.0, 0.02]),
    loss=st.sampled_from([0.0, 0.5]),
    num_pages=st.sampled_from([40, 400]),
)
def test_nothing_is_lost_whatever_fails(
    fail, aborts, deadlines, routing, delay, loss, num_pages
) -> None:
    """Failed replicas, clients that leave, deadlines, lost events, a pool too small for all: each
    request ends once, in one way, and nobody gets a token too many."""
    base = mix(12)

    def requests():
        for each in base.requests():
            yield dataclasses.replace(
                each,
                abort_s=aborts.get(each.number),
                deadline_s=deadlines.get(each.number),
            )

    workload = dataclasses.replace(base, requests=requests)
    texts = [f"{r}:{d:.3f}" if u is None else f"{r}:{d:.3f}:{u:.3f}" for r, d, u in fail]
    deployed = deployment(
        replicas=3,
        routing=routing,
        fail=tuple(texts),
        submit_s=delay,
        deliver_s=delay,
        cache_event_loss=loss,
        num_pages=num_pages,
        scheduler={"order": "dlpm", "slicing": "fixed", "slice_steps": 32},
    )
    recorder = run(workload, deployed)
    tokens, ended = delivered(recorder), {number: reason for number, _, reason in recorder.ends}
    assert len(recorder.ends) == len(ended) == 12
    for each in base.requests():
        assert tokens[each.number] <= each.output_tokens
        if ended[each.number] in ("stop", "length"):
            assert tokens[each.number] == each.output_tokens
        elif ended[each.number] == "abort":
            assert each.number in aborts
        elif ended[each.number] == "deadline":
            assert each.number in deadlines
        else:  # all replicas failed for good
            assert ended[each.number] == "error" and len({r for r, _, u in fail if u is None}) == 3


def test_the_same_settings_give_the_same_run() -> None:
    one, two = (
        run(mix(), deployment(replicas=2, routing="d2lpm", noise=1.0, cache_event_loss=0.2, seed=7))
        for _ in range(2)
    )
    assert one.ends == two.ends
    for a, b in zip(one.delivered_columns(), two.delivered_columns(), strict=True):
        assert (a == b).all()


def test_a_changed_profile_changes_the_result() -> None:
    """Nothing is kept between runs that could hide what a profile says now."""

    def last_s(profile: Profile) -> float:
        return max(at_s for _, at_s, _ in run(mix(), deployment(profile=profile)).ends)

    def slower(factor: float) -> Profile:
        device = dataclasses.replace(
            H200.time.device, memory_bytes_per_s=H200.time.device.memory_bytes_per_s / factor
        )
        return dataclasses.replace(H200, time=dataclasses.replace(H200.time, device=device))

    assert slower(1.0).key == H200.key and slower(20.0).key != H200.key
    before = last_s(H200)
    assert last_s(slower(20.0)) > 1.5 * before
    assert last_s(H200) == before


def test_policies_do_not_see_how_long_an_output_is() -> None:
    """Hidden outputs: as long as they state the same limits, requests are let in alike."""
    shapes = []
    for output in (5, 40):
        recorder = run(
            of(*(work(i, output_tokens=output, max_tokens=64) for i in range(8))),
            deployment(scheduler={"admission": "reserve_max", "max_rows": 4}, num_pages=12),
        )
        assert {reason for *_, reason in recorder.ends} == {"stop"}
        shapes.append(recorder.slices.kept["rows"][0])
    assert shapes[0] == shapes[1] == 4


def test_what_a_failed_replica_had_goes_on_where_it_stopped() -> None:
    deployed = deployment(replicas=2, routing="round_robin", fail=("0:0.5",))
    recorder = run(of(work(0, output_tokens=200, max_tokens=200)), deployed)
    _, times, _ = recorder.delivered_columns()
    assert delivered(recorder) == {0: 200} and times.min() < 0.5 < times.max()
    assert recorder.ended_columns()["replica"].tolist() == [1]


def test_held_requests_run_when_a_replica_is_back() -> None:
    recorder = run(of(work(0, arrival_s=1.0)), deployment(fail=("0:0.5:4",)))
    assert delivered(recorder) == {0: 50}
    assert recorder.delivered_columns()[1].min() > 4.0


def test_a_client_may_leave_before_its_request_is_refused() -> None:
    """It is on its way when its client hangs up; the replica, whose queue is full, refuses it."""
    works = [work(i) for i in range(3)] + [work(3, abort_s=0.01)]
    deployed = deployment(scheduler={"max_rows": 1, "max_waiting": 1}, submit_s=0.02)
    recorder = run(of(*works), deployed)
    reasons = {number: reason for number, _, reason in recorder.ends}
    assert reasons[3] == "abort" and "refused" in reasons.values()
    assert len(recorder.ends) == 4


def test_clients_share_no_prefix_where_they_may_not() -> None:
    """Two clients with one prompt: found cached by the second, unless the cache is by client."""
    works = [work(i, arrival_s=float(i), client=f"c{i}", blocks=(7,)) for i in range(2)]
    shared = dataclasses.replace(of(*works), block_size=128, has_clients=True)
    cached = {}
    for scope in ("all", "client"):
        base = deployment()
        cache = dataclasses.replace(base.engine.cache, prefix_scope=scope)
        engine = dataclasses.replace(base.engine, cache=cache)
        recorder = run(shared, dataclasses.replace(base, engine=engine))
        cached[scope] = recorder.ended_columns()["cached"].tolist()
    assert cached == {"all": [0, 64], "client": [0, 0]}
    with pytest.raises(ConfigError, match="prefix_scope: got 'group'; allowed: auto, client, all"):
        cache = CacheConfig(page_size=64, num_pages=8, prefix_scope="group")
        Deployment(engine=EngineConfig(cache=cache), sim=SimConfig(), profile=H200)


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    recorder = run(mix(), deployment(), loop="closed", concurrency=4)
    sent, ended = recorder.sent_columns()["at_s"], sorted(at_s for _, at_s, _ in recorder.ends)
    for at_s in sent:
        assert (sent <= at_s).sum() - sum(end <= at_s for end in ended) <= 4


@pytest.mark.parametrize(
    ("scheduler", "sim", "workload", "message"),
    [
        ({"order": "lpm"}, {}, of(work(0)), "order=lpm: .* no shared prefixes; .*--blind"),
        ({"order": "vtc"}, {}, of(work(0)), "order=vtc: .* no clients; .*--blind"),
        ({}, {"routing": "d2lpm"}, of(work(0)), "routing: got 'd2lpm'; .*--blind"),
        ({}, {"routing": "conversation_affinity"}, mix(1), "routing: got 'conv.*sessions"),
    ],
)
def test_a_policy_that_needs_more_is_refused_before_anything_runs(
    scheduler, sim, workload, message
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(workload, deployment(scheduler=scheduler, **sim))


def test_the_profile_and_the_pages_must_fit() -> None:
    with pytest.raises(ConfigError, match="page_size: got 32; allowed: 64, as in the profile of"):
        Deployment(
            engine=EngineConfig(cache=CacheConfig(page_size=32)), sim=SimConfig(), profile=H200
        )
    with pytest.raises(ConfigError, match="num_pages: got none"):
        Deployment(
            engine=EngineConfig(),
            sim=SimConfig(),
            profile=dataclasses.replace(H200, num_pages=None),
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replicas": 0}, "replicas: got 0"),
        ({"fail": ("2:1",)}, "fail: got 2; allowed: replicas 0 to 0"),
        ({"fail": ("0:5:4",)}, "fail: got '0:5:4'; allowed: a return after"),
        ({"fail": ("soon",)}, "fail: got 'soon'; allowed: <replica>:<seconds"),
        ({"routing": "nearest"}, "routing: got 'nearest'; allowed: round_robin"),
        ({"cache_event_loss": 2.0}, "cache_event_loss: got 2.0"),
        ({"report_s": 0.0}, "report_s: got 0.0; allowed: more than 0"),
    ],
)
def test_settings_are_judged(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SimConfig(**fields)


@pytest.mark.parametrize("pool", ["static", "scls", "scls_resident"])
def test_a_pool_serves_the_same_requests(pool: str) -> None:
    """Whoever plans: `static` learns from the workload how long requests may be."""
    workload = of(*(work(n, prompt_tokens=2000 + n, output_tokens=10 + n) for n in range(9)))
    heard: list[int] = []
    recorder = Recorder()
    simulate(
        workload,
        Feed(workload),
        deployment(replicas=2, pool=pool),
        recorder,
        tick=lambda num_ended, now_s: heard.append(num_ended),
    )
    assert delivered(recorder) == {it.number: it.output_tokens for it in workload.requests()}
    assert heard[-1] == 9
