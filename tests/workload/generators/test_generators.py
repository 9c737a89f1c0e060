"""What every generator keeps to, and what each is named for."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.workload.generators import GENERATORS, describe, generate
from jaxserve.workload.generators.lengths import Lengths
from jaxserve.workload.work import Work, Workload

NAMES = sorted(GENERATORS)
ARRIVALS = (
    (),
    ("arrivals=gamma", "cv=3"),
    ("arrivals=on_off", "on_s=5", "off_s=20"),
    ("arrivals=even",),
)


def requests(name: str, *options: str, number: int = 300, seed: int = 0) -> list[Work]:
    return list(generate(name, options, num_requests=number, seed=seed).requests())


def chains_hold(works: list[Work]) -> bool:
    parents: dict[int, int] = {}
    for work in works:
        before = (-1, *work.blocks[:-1])
        if any(
            parents.setdefault(block, parent) != parent
            for block, parent in zip(work.blocks, before, strict=False)
        ):
            return False
    return True


@given(st.sampled_from(NAMES), st.integers(0, 2**63 - 1), st.sampled_from(ARRIVALS))
def test_requests_are_valid_and_the_same_each_time(
    name: str, seed: int, arrivals: tuple[str, ...]
) -> None:
    options = () if name == "mix" else (*arrivals, "clients=3")
    workload = generate(name, options, num_requests=100, seed=seed)
    works = list(workload.requests())
    assert works == list(workload.requests())
    assert works == list(generate(name, options, num_requests=100, seed=seed).requests())
    assert [work.number for work in works] == list(range(100))
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(works))
    assert chains_hold(works)
    turns = defaultdict(list)
    for work in works:
        assert work.prompt_tokens >= 1 and work.max_tokens == work.output_tokens >= 1
        assert work.prompt_tokens + work.output_tokens <= workload.longest_tokens
        assert 16 * (len(work.blocks) - 1) < work.prompt_tokens
        assert bool(work.session) <= workload.has_sessions
        assert bool(work.blocks) <= bool(workload.block_size)
        turns[work.session].append(work)
    turns.pop(None, None)
    for session in turns.values():
        assert session[0].think_s is None
        for before, work in pairwise(session):
            assert before.arrival_s <= work.arrival_s and work.think_s is not None
            assert work.think_s >= work.arrival_s - before.arrival_s - 1e-6


def test_another_seed_is_another_workload() -> None:
    for name in NAMES:
        assert requests(name, number=20) != requests(name, number=20, seed=1)


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_the_rate_is_kept_and_bursts_differ(arrivals: tuple[str, ...]) -> None:
    works = requests("independent", "rate=20", "prompt=1", *arrivals, number=6000)
    gaps_s = np.diff([work.arrival_s for work in works])
    assert 6000 / works[-1].arrival_s == pytest.approx(20, rel=0.25)
    variation = gaps_s.std() / gaps_s.mean()
    expected = {
        (): (0.9, 1.1),
        ARRIVALS[1]: (2.4, 3.6),
        ARRIVALS[2]: (2.0, 30),
        ARRIVALS[3]: (0, 0.01),
    }
    least, most = expected[arrivals]
    assert least <= variation <= most


def test_a_client_more_changes_nobody_elses_requests() -> None:
    """The greedy one too is only added to the others."""

    def of_clients(clients: int, rate: int, *more: str) -> dict[str, list[tuple]]:
        options = (f"clients={clients}", f"rate={rate}", *more)
        told = defaultdict(list)
        for work in requests("fair_mix", *options, number=400):
            name = "client-0" if work.client == "greedy" else work.client
            told[name].append((work.arrival_s, work.prompt_tokens, work.output_tokens, work.blocks))
        return told

    three, four = of_clients(3, 30), of_clients(4, 40)
    greedy = of_clients(3, 30, "greedy=4")
    for client in ("client-1", "client-2"):
        for other in (four, greedy):
            common = min(len(three[client]), len(other[client]))
            assert common > 50 and three[client][:common] == other[client][:common]
    assert len(greedy["client-0"]) > 2.5 * len(greedy["client-1"])


def test_clients_have_rates_and_weights() -> None:
    works = requests("independent", "clients=4", "skew=1", "weights=1,2", number=3000)
    counts = Counter(work.client for work in works)
    assert counts["client-0"] / counts["client-3"] == pytest.approx(4, rel=0.2)
    assert {(work.client, work.weight) for work in works} == {
        ("client-0", 1.0),
        ("client-1", 2.0),
        ("client-2", 1.0),
        ("client-3", 2.0),
    }


def test_patience_is_drawn() -> None:
    works = requests("independent", "aborts=0.25", "abort_s=3", "deadline_s=9", number=2000)
    after_s = [work.abort_s for work in works if work.abort_s is not None]
    assert len(after_s) / 2000 == pytest.approx(0.25, rel=0.2)
    assert np.mean(after_s) == pytest.approx(3, rel=0.2)
    assert {work.deadline_s for work in works} == {9.0}


def test_popular_prefixes_are_drawn_more_often() -> None:
    works = requests("shared_prefix", "zipf=1.2", "prefixes=8", number=3000)
    counts = Counter(work.blocks[-1] for work in works).most_common()
    assert len(counts) == 8 and counts[0][1] > 5 * counts[-1][1]
    own = requests("shared_prefix", "owner=client", "clients=2", "prefixes=4")
    blocks = defaultdict(set)
    for work in own:
        blocks[work.client].update(work.blocks)
    assert not blocks["client-0"] & blocks["client-1"]


def test_a_conversation_goes_on_where_its_answer_ended() -> None:
    sessions = defaultdict(list)
    for work in requests("chat", "system=40", "clients=2"):
        sessions[work.session].append(work)
    assert max(map(len, sessions.values())) > 3
    for session in sessions.values():
        assert session[0].blocks[:3] == sessions["client-0/0"][0].blocks[:3]  # the system prompt
        for before, work in pairwise(session):
            assert work.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert work.blocks[: len(before.blocks)] == before.blocks


def test_questions_share_a_document() -> None:
    works = requests("long_context_qa", "documents=3")
    assert len({work.blocks for work in works}) == 3
    assert all(work.prompt_tokens > 16 * len(work.blocks) for work in works)


def test_judges_share_an_item_and_items_a_rubric() -> None:
    works = requests("judge", "judges=3", number=90)
    items = defaultdict(list)
    for work in works:
        assert work.blocks[:32] == works[0].blocks[:32]
        items[work.blocks].append(work.arrival_s)
    assert len(items) == 30
    assert all(len(times) == 3 and len(set(times)) == 1 for times in items.values())


def test_thoughts_branch_from_the_kept_ones() -> None:
    works = [w for w in requests("tree_of_thoughts") if w.session == "client-0/0"]
    assert len(works) == 3 * (1 + 2 + 2)
    levels = [works[:3], works[3:9], works[9:]]
    for before, level in pairwise(levels):
        parents = {work.blocks for work in before}
        prompts = Counter(work.blocks for work in level)
        assert list(prompts.values()) == [3, 3]
        for blocks in prompts:
            assert any(blocks[: len(parent)] == parent for parent in parents)


def test_a_mix_keeps_its_parts_apart() -> None:
    mix = requests("mix", "parts=chat rate=4 clients=2 + judge rate=4 weights=3", number=200)
    assert {work.client for work in mix} == {
        "chat-1:client-0",
        "chat-1:client-1",
        "judge-2:client-0",
    }
    alone = requests("chat", "rate=4", "clients=2", number=200)
    part = [work for work in mix if work.client.startswith("chat")]
    for mine, other in zip(part, alone, strict=False):
        name = mine.client.removeprefix("chat-1:")
        same = replace(mine, number=other.number, client=name, session=other.session)
        assert same == other
    assert {work.weight for work in mix} == {1.0, 3.0}


def test_fair_mix_is_what_its_name_stands_for() -> None:
    workload = generate("fair_mix", num_requests=3000)
    works = list(workload.requests())
    assert workload.has_clients and len({work.client for work in works}) == 16
    assert np.mean([work.prompt_tokens for work in works]) == pytest.approx(512, rel=0.05)
    assert np.mean([work.output_tokens for work in works]) == pytest.approx(128, rel=0.05)


@given(st.sampled_from(["7", "uniform:3,9", "lognormal:50,0.7,4,300"]), st.integers(0, 1000))
def test_lengths_are_inside_and_average_as_said(text: str, seed: int) -> None:
    lengths = Lengths.parse("x", text)
    drawn = lengths.draw(np.random.default_rng(seed), 4000)
    assert lengths.least <= drawn.min() and drawn.max() <= lengths.most
    assert drawn.mean() == pytest.approx(lengths.average(), rel=0.08)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chats", (), "workload: got 'chats'; allowed: .*; did you mean 'chat'"),
        (
            "chat",
            ("rat=3",),
            "workload_options: unknown parameter 'rat'; did you mean 'rate'",
        ),
        ("chat", ("rate",), "got 'rate'; options look like parameter=value"),
        ("chat", ("rate=1", "rate=2"), "rate: got it twice"),
        ("chat", ("rate=nan",), "rate: got nan; allowed: a positive number"),
        ("chat", ("turns=0",), "turns: got '0'; allowed: lengths from 1"),
        ("chat", ("user=lognormal:8",), "user: got 'lognormal:8'; allowed: 512, uniform"),
        ("chat", ("cv=2",), "cv: got 2.0; allowed: unset unless arrivals=gamma"),
        ("chat", ("arrivals=gamma",), "cv: got 0.0; allowed: a positive number with"),
        ("chat", ("arrivals=often",), "arrivals: got 'often'; allowed: poisson, gamma"),
        ("chat", ("greedy=3",), "greedy: got 3.0; allowed: 1 unless there are 2 clients"),
        ("chat", ("weights=1,0",), "weights: got '1,0'; allowed: positive numbers"),
        ("chat", ("aborts=0.5",), "abort_s: got 0.0; allowed: positive with aborts"),
        ("tree_of_thoughts", ("keep=4",), "keep: got 4; allowed: 1 to 3"),
        ("mix", ("parts=chat + mix",), "parts: got 'mix'; allowed: any generator but mix"),
        ("mix", ("parts=chat +",), "parts: got 'chat \\+'"),
        ("mix", ("parts=chat + judge block_size=8",), "the same in all parts"),
    ],
)
def test_bad_options_are_refused(name: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(name, options)


def test_people_are_told_of_every_generator() -> None:
    told = "\n".join(describe())
    assert all(f"{name}: " in told for name in NAMES)
    assert "arrivals=poisson (poisson|gamma|on_off|even)" in told


def test_a_workload_says_where_it_is_from() -> None:
    workload: Workload = generate("chat", ["rate=2"], seed=5)
    assert workload.described == {"generator": "chat", "options": "rate=2", "seed": "5"}
