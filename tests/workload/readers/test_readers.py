"""Every format is read as it is meant, and what is wrong in a file is said by line and field."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.workload.readers import read_trace
from jaxserve.workload.work import Work

META = {"meta": {"name": "small", "source": "a test", "licence": "none", "block_size": 4}}
ROW = {"arrival_s": 0.0, "client": None, "prompt_tokens": 9, "output_tokens": 3}
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.0319600,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2024-05-10 00:00:00.009930+00:00,2162,5\r
2024-05-10 00:00:00.017335+00:00,2399,6\r
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 1000, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 1600, "output_length": 26, "hash_ids": [46, 47, 2353, 9]}
"""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: object, name: str = "trace.jsonl") -> str:
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts))
        return str(path)

    return write


def row(**changed: object) -> dict[str, object]:
    return ROW | changed


def test_the_own_format(write: Write) -> None:
    full = {
        "arrival_s": 1,
        "client": "b",
        "prompt_tokens": 9,
        "output_tokens": 3,
        "block_hashes": [0, 1, 2],
        "session": "s",
        "max_tokens": 8,
        "weight": 2,
        "priority": -1,
        "deadline_s": 4.5,
        "abort_s": 3,
        "think_s": 0.5,
    }
    workload = read_trace(write(META, row(client="a", block_hashes=[0, 1]), "", full))
    assert (workload.name, workload.num_requests, workload.block_size) == ("small", 2, 4)
    assert workload.has_clients and workload.has_sessions
    assert workload.rate == 1.0 and workload.longest_tokens == 12
    assert workload.described["source"] == "a test"
    assert list(workload.requests()) == [
        Work(
            number=0,
            arrival_s=0.0,
            prompt_tokens=9,
            output_tokens=3,
            max_tokens=3,
            client="a",
            blocks=(0, 1),
        ),
        Work(
            number=1,
            arrival_s=1.0,
            prompt_tokens=9,
            output_tokens=3,
            max_tokens=8,
            client="b",
            weight=2.0,
            blocks=(0, 1, 2),
            session="s",
            priority=-1,
            deadline_s=4.5,
            abort_s=3.0,
            think_s=0.5,
        ),
    ]


@pytest.mark.parametrize("text", [AZURE, AZURE_2024, "\ufeff" + AZURE])
def test_azure(write: Write, text: str) -> None:
    workload = read_trace(write(text, name="azure.csv"))
    works = list(workload.requests())
    assert (workload.name, workload.block_size, workload.has_clients) == ("azure", 0, False)
    assert works[0].arrival_s == 0.0 and works[1].arrival_s in (0.052, 0.007405)
    assert [(w.prompt_tokens, w.output_tokens) for w in works] in (
        [(374, 44), (396, 109)],
        [(2162, 5), (2399, 6)],
    )


def test_mooncake(write: Write) -> None:
    workload = read_trace(write(MOONCAKE))
    first, second = workload.requests()
    assert workload.block_size == 512
    assert first.arrival_s == 27.482 and first.blocks == (46, 47)
    assert (second.prompt_tokens, second.output_tokens) == (1600, 26)


def test_gzip_is_known_by_content_not_by_name(write: Write, tmp_path: Path) -> None:
    plain = write(META, ROW, ROW)
    zipped = tmp_path / "zipped.jsonl"
    zipped.write_bytes(gzip.compress(Path(plain).read_bytes()))
    assert list(read_trace(str(zipped)).requests()) == list(read_trace(plain).requests())


def test_sessions_stand_for_clients_that_are_missing(write: Write) -> None:
    path = write(META, row(session="s"), row(session="t"), row(session=None))
    for client_from in ("auto", "session"):
        workload = read_trace(path, client_from=client_from)
        assert workload.has_clients
        assert [work.client for work in workload.requests()] == ["s", "t", "anonymous"]
    workload = read_trace(path, client_from="none")
    assert not workload.has_clients
    assert {work.client for work in workload.requests()} == {"anonymous"}


def test_a_turn_thinks_as_long_as_the_trace_shows(write: Write) -> None:
    rows = [row(session=s, arrival_s=at) for s, at in (("s", 0), ("t", 1), ("s", 3), ("s", 7.5))]
    works = read_trace(write(META, *rows)).requests()
    assert [work.think_s for work in works] == [None, None, 3.0, 4.5]


def test_a_window_starts_at_zero(write: Write) -> None:
    path = write(META, *[row(arrival_s=float(i), session="s") for i in range(10)])
    workload = read_trace(path, from_s=3.0, until_s=6.0)
    works = list(workload.requests())
    assert [work.arrival_s for work in works] == [0.0, 1.0, 2.0]
    assert works[0].number == 0 and works[0].think_s is None
    with pytest.raises(ConfigError, match="no requests in the window"):
        read_trace(path, from_s=30.0)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([None, "s", "t"])), min_size=1),
    st.sampled_from([0.5, 3.0, 10.0]),
    st.integers(0, 9),
)
def test_jitter_delays_and_keeps_sessions_in_order(tmp_path_factory, told, jitter_s, seed) -> None:
    at_s, rows = 0, []
    for number, (steps, session) in enumerate(told):
        at_s += 3 * steps
        rows.append(row(arrival_s=at_s, prompt_tokens=number + 1, session=session))
    path = tmp_path_factory.mktemp("jitter") / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (META, *rows)))
    workload = read_trace(str(path), jitter_s=jitter_s, seed=seed)
    works = list(workload.requests())
    assert works == list(workload.requests())
    assert [work.number for work in works] == list(range(len(rows)))
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(works))
    turns = defaultdict(list)
    for work in works:
        was_s = rows[work.prompt_tokens - 1]["arrival_s"]
        assert was_s <= work.arrival_s <= was_s + jitter_s
        turns[work.session].append(work.prompt_tokens)
    turns.pop(None, None)
    assert all(order == sorted(order) for order in turns.values())


@pytest.mark.parametrize(
    ("changed", "field", "allowed"),
    [
        ({"prompt_tokens": -4}, "prompt_tokens: got -4", "1 to 2147483647"),
        ({"prompt_tokens": 0}, "prompt_tokens: got 0", "try to leave the line out"),
        ({"prompt_tokens": True}, "prompt_tokens: got True", "a whole number"),
        ({"prompt_tokens": 3.5}, "prompt_tokens: got 3.5", "a whole number"),
        ({"prompt_tokens": 2**31}, "prompt_tokens: got 2147483648", "1 to 2147483647"),
        ({"prompt_tokens": None}, "prompt_tokens: got None", "a whole number"),
        ({"output_tokens": 0}, "output_tokens: got 0", "try to leave the line out"),
        ({"output_tokens": "7"}, "output_tokens: got '7'", "a whole number"),
        ({"arrival_s": -1.0}, "arrival_s: got -1.0", "seconds, 0 or more"),
        ({"arrival_s": float("nan")}, "arrival_s: got nan", "seconds, 0 or more"),
        ({"arrival_s": float("inf")}, "arrival_s: got inf", "seconds, 0 or more"),
        ({"arrival_s": True}, "arrival_s: got True", "seconds, 0 or more"),
        ({"arrival_s": 4.0}, "arrival_s: got 4.0", "5 or later, as on the line before; try"),
        ({"client": 7}, "client: got 7", "a name or null"),
        ({"session": []}, "session: got \\[\\]", "a name or null"),
        ({"block_hashes": [1, -2]}, "block_hashes: got \\[1, -2\\]", "a list of whole numbers"),
        ({"block_hashes": [1, True]}, "block_hashes: got \\[1, True\\]", "a list of whole"),
        ({"block_hashes": [1, 2, 3, 4]}, "block_hashes: got 4 blocks", "at most 3, blocks of 4"),
        ({"block_hashes": [8, 7]}, "block_hashes: got block 8 at the beginning", "behind 7"),
        ({"block_hashes": [7, 9]}, "block_hashes: got block 9 behind 7", "behind 8"),
        ({"max_tokens": 0}, "max_tokens: got 0", "or null"),
        ({"weight": 0}, "weight: got 0", "a positive number, or null"),
        ({"priority": 1.0}, "priority: got 1.0", "a whole number of 32 bits"),
        ({"deadline_s": 0}, "deadline_s: got 0", "a positive number"),
        ({"abort_s": -1}, "abort_s: got -1", "seconds, 0 or more"),
        ({"think_s": "1"}, "think_s: got '1'", "seconds, 0 or more"),
        ({"prioriti": 1}, "prioriti: got 1", "no such field, only arrival_s, "),
    ],
)
def test_a_wrong_field_is_named_with_its_line(
    write: Write, changed: dict[str, object], field: str, allowed: str
) -> None:
    good = row(arrival_s=5.0, block_hashes=[7, 8, 9])
    path = write(META, good, row(**({"arrival_s": 5.0} | changed)))
    with pytest.raises(ConfigError, match=f"trace.jsonl, line 3, {field}.*; allowed: .*{allowed}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("",), "trace.jsonl', which is empty; allowed: requests, one a line"),
        ((META,), "which has no requests; allowed: 1 or more"),
        ((META, "{"), "line 2, line: got '{'; allowed: JSON"),
        ((META, "[1]"), r"line 2, line: got \[1\]; allowed: a JSON object"),
        ((META, {"arrival_s": 0}), "line 2, prompt_tokens: got nothing; allowed: a whole"),
        ((META, '{"arrival_s": 1e999}'), "line 2, arrival_s: got inf"),
        ((ROW,), 'line 1, meta: got nothing; allowed: {"meta"'),
        (({"meta": 3},), "line 1, meta: got nothing"),
        (({"meta": {"block_size": 0}},), "line 1, meta.block_size: got 0"),
        (({"meta": {"block_size": True}},), "line 1, meta.block_size: got True"),
        (
            ({"meta": {}}, row(block_hashes=[1])),
            "line 2, block_hashes: got 1 blocks; allowed: none",
        ),
        (("hello",), "line 1, line: got 'hello'; allowed: jaxserve .*; mooncake .*; azure "),
        (('{"a": 1}',), "line 1, line: got .*; allowed: jaxserve "),
        ((AZURE.replace(",GeneratedTokens", ""),), "line 1, header: got 'TIMESTAMP,ContextTokens'"),
        ((AZURE + "2023-11-16 18:17:05,1",), "line 4, line: got 2 columns; allowed: 3"),
        ((AZURE + "yesterday,1,1",), "line 4, TIMESTAMP: got 'yesterday'; allowed: a time"),
        ((AZURE + "2023-11-16 18:17:05+00:00,1,1",), "line 4, TIMESTAMP: .*all with a time zone"),
        ((AZURE + "2023-11-16 18:17:01,1,1",), "line 4, TIMESTAMP: .*; try to sort by it"),
        ((AZURE + "2023-11-16 18:17:04.01,1,1",), "line 4, TIMESTAMP: got 0.03.* or later"),
        ((AZURE + "2023-11-16 18:17:05,0,1",), "line 4, ContextTokens: got '0'; allowed: a whole"),
        ((AZURE + "2023-11-16 18:17:05,1,-1",), "line 4, GeneratedTokens: got '-1'"),
        ((AZURE + "2023-11-16 18:17:05,1_0,1",), "line 4, ContextTokens: got '1_0'"),
        ((AZURE + "2023-11-16 18:17:05,1,",), "line 4, GeneratedTokens: got nothing"),
        ((MOONCAKE.replace("52", "0"),), "line 1, output_length: got 0; allowed: .*leave the line"),
        ((MOONCAKE.replace("30535", "1"),), "line 2, timestamp: got 0.001; allowed: 27.482 or"),
        ((MOONCAKE.replace("9]", "9, 8]"),), "line 2, hash_ids: got 5 blocks; allowed: at most 4"),
        ((MOONCAKE.replace(", 9]", ', "9"]'),), r"line 2, hash_ids: got \[46"),
    ],
)
def test_a_wrong_file_is_refused(write: Write, lines: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(*lines))


def test_a_gzip_file_cut_short_or_broken_is_refused(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(line) for line in (META, *[row(client=str(i)) for i in range(99)]))
    whole, path = gzip.compress(text.encode()), tmp_path / "trace.gz"
    path.write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match=r"trace.gz, line \d+: got a gzip file that ends early"):
        read_trace(str(path))
    path.write_bytes(whole[:60] + b"\0\0\0\0\0\0" + whole[66:])
    with pytest.raises(ConfigError, match=r"trace.gz, line \d+: got broken gzip"):
        read_trace(str(path))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [json.dumps(META), json.dumps(row(client="X"))]
    path.write_bytes("\n".join(lines).encode().replace(b"X", b"\xff"))
    with pytest.raises(ConfigError, match="trace.jsonl, line 2, line: got"):
        read_trace(str(path))


def test_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"trace: got .* \(.*directory\); allowed: a file"):
            read_trace(str(path))


def test_a_format_or_clients_that_are_not_there_are_refused(write: Write) -> None:
    path = write(META, ROW)
    with pytest.raises(ConfigError, match="trace_format: got 'azur'; .* did you mean 'azure'"):
        read_trace(path, trace_format="azur")
    with pytest.raises(ConfigError, match="line 1, header: got"):
        read_trace(path, trace_format="azure")
    with pytest.raises(ConfigError, match="client_from: got 'client', .*allowed: none"):
        read_trace(path, client_from="client")
    with pytest.raises(ConfigError, match="client_from: got 'session', .*allowed: none"):
        read_trace(path, client_from="session")
    with pytest.raises(ConfigError, match="client_from: got 'user'; allowed: auto, client"):
        read_trace(path, client_from="user")
