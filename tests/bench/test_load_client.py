"""The load client over real sockets: a real server at a known pace, and servers that misbehave."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from jaxserve import launch
from jaxserve.bench.against import like_server
from jaxserve.bench.client_cost import even_workload, measure, mock_server
from jaxserve.bench.grpc_transport import GrpcTransport
from jaxserve.bench.http_transport import HttpTransport
from jaxserve.bench.load_client import LoadClient
from jaxserve.bench.peers.jaxserve_peer import Server, serving
from jaxserve.bench.tally import Tally
from jaxserve.bench.transport import Asking, ServerFacts, Transport, read_client_keys
from jaxserve.errors import ConfigError
from jaxserve.models.profile import find_profile
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import read_report
from jaxserve.sim.run import build_fleet
from jaxserve.sim_config import SimConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work, Workload

DIALECTS = ("grpc", "openai")
MAX_ROWS, SLICE_STEPS, SLICE_S = 4, 4, 0.05
"""Four rows, each four tokens every 50 ms: 320 tokens/s."""


@pytest.fixture(scope="module")
def profile(write_profile) -> str:
    return write_profile("llama-14m", step_s=SLICE_S / SLICE_STEPS)


@pytest.fixture(scope="module")
def server(profile) -> Iterator[Server]:
    flags = [f"--max_rows={MAX_ROWS}", "--slicing=fixed", f"--slice_steps={SLICE_STEPS}"]
    flags += ["--executor=paced", f"--profile={profile}", "--num_pages=256"]
    flags += ["--page_size=16", "--order=vtc"]
    with serving(flags) as server:
        yield server


def open_transport(dialect: str, server: Server, **asking) -> Transport:
    if dialect == "grpc":
        return GrpcTransport(server.target, Asking(**asking), connections=2)
    return HttpTransport(server.url, Asking(**asking))


def workload_of(*works: Work) -> Workload:
    return Workload(name="test", requests=lambda: iter(works), num_requests=len(works))


def work(number: int, **fields) -> Work:
    values = {"arrival_s": 0.02 * number, "prompt_tokens": 16, "output_tokens": 8, "max_tokens": 8}
    return Work(number=number, **(values | fields))


def draw(work: Work) -> np.ndarray:
    return np.random.default_rng(work.number).integers(3, 256, work.prompt_tokens, dtype=np.int32)


class Deliveries(Recorder):
    """Keeps what it is told of each request, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[int, list[tuple[float, int]]] = {}

    def sent(self, work: Work, at_s: float) -> None:
        super().sent(work, at_s)
        self.told[work.number] = [(at_s, 0)]

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        super().delivered(number, at_s, num_tokens)
        self.told[number].append((at_s, num_tokens))


def run(
    make_transport: Callable[[], Transport],
    feed: Feed,
    *,
    during: Callable[[LoadClient, Tally], object] | None = None,
    **options,
) -> tuple[LoadClient, Tally, Deliveries]:
    """One run to its end. `during` may return a coroutine, which runs beside it."""

    async def running():
        transport, tally, recorder = make_transport(), Tally(), Deliveries()
        await transport.facts() if options.pop("ask", True) else None
        client = LoadClient(transport, feed, draw, recorder=recorder, tally=tally, **options)
        beside = [] if during is None else [during(client, tally)]
        await asyncio.wait_for(asyncio.gather(client.run(), *beside), 30)
        await transport.close()
        return client, tally, recorder

    return asyncio.run(running())


# ------------------------------------------------------------------------------ what is counted


def test_both_dialects_give_the_same_counts(server):
    works = [work(n, prompt_tokens=5 + n, output_tokens=1 + n, max_tokens=1 + n) for n in range(12)]
    for dialect in DIALECTS:
        client, tally, recorder = run(
            partial(open_transport, dialect, server), Feed(workload_of(*works))
        )
        assert not client.died and (tally.num_sent, tally.num_done, tally.num_failed) == (12, 12, 0)
        assert {number: row.tokens for number, row in tally.rows.items()} == {
            it.number: it.max_tokens for it in works
        }
        assert sorted((number, reason) for number, _, reason in recorder.ends) == [
            (number, "length") for number in range(12)
        ]
        for it in works:
            times = [at_s for at_s, _ in recorder.told[it.number]]
            assert times == sorted(times) and times[0] == it.arrival_s  # from when it was due
            assert sum(tokens for _, tokens in recorder.told[it.number]) == it.max_tokens


def test_the_server_says_what_it_is(server):
    async def ask(dialect: str):
        transport = open_transport(dialect, server)
        facts = await transport.facts()
        await transport.close()
        return facts

    grpc, http = (asyncio.run(ask(dialect)) for dialect in DIALECTS)
    assert (grpc.model, grpc.vocab_size, grpc.max_context) == (
        http.model,
        http.vocab_size,
        http.max_context,
    )
    assert grpc.vocab_size and grpc.max_context and grpc.configuration["executor"] == "paced"


def test_a_closed_loop_keeps_so_many_under_way(server):
    works = [work(number, arrival_s=0.0, max_tokens=4) for number in range(9)]
    _, tally, _ = run(
        lambda: open_transport("grpc", server),
        Feed(workload_of(*works), loop="closed", concurrency=3),
    )
    assert tally.num_done == 9
    rows = tally.rows.values()
    for row in rows:
        under_way = [it for it in rows if it.due_s <= row.due_s < it.ended_s]
        assert len(under_way) <= 3


@pytest.mark.parametrize("dialect", DIALECTS)
def test_aborts_deadlines_and_refusals_are_told_apart(server, dialect):
    long = {"output_tokens": 400, "max_tokens": 400}
    works = [
        work(0, abort_s=0.1, **long),
        work(1, deadline_s=0.15, **long),
        work(2, prompt_tokens=3, max_tokens=10**6),
        work(3),
    ]
    _, tally, recorder = run(lambda: open_transport(dialect, server), Feed(workload_of(*works)))
    reasons = {number: reason for number, _, reason in recorder.ends}
    assert reasons == {0: "abort", 1: "deadline", 2: "refused", 3: "length"}
    assert tally.rows[0].tokens < 400 and tally.rows[1].tokens < 400
    assert (tally.num_aborted, tally.num_failed, tally.num_done) == (1, 2, 1)
    assert sum(tally.faults.values()) == 2
    refusal = {"grpc": "INVALID_ARGUMENT", "openai": "HTTP 400"}[dialect]
    assert "max_tokens" in tally.said[refusal]
    assert any(refusal in line for line in tally.closing_lines("x"))


def test_a_stopped_run_keeps_what_it_measured(server):
    works = [work(0), work(1, max_tokens=400), work(2, arrival_s=1000.0)]

    async def stop(client: LoadClient, tally: Tally) -> None:
        while not tally.num_done:
            await asyncio.sleep(0.01)
        client.stop()

    client, tally, recorder = run(
        lambda: open_transport("openai", server), Feed(workload_of(*works)), during=stop
    )
    assert not client.died and tally.num_sent == 2 and tally.num_running == 1
    assert [number for number, _, _ in recorder.ends] == [0]


def test_sending_and_waiting_can_be_bounded(server):
    works = [work(0), work(1, max_tokens=400), work(2, arrival_s=1000.0)]
    _, tally, _ = run(
        lambda: open_transport("grpc", server),
        Feed(workload_of(*works)),
        send_s=0.1,
        grace_s=0.3,
    )
    assert tally.num_sent == 2 and tally.num_running == 1


# ------------------------------------------------------------------------------ servers that fail


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_that_dies_ends_the_run(dialect):
    with mock_server(tokens_per_message=1, stream_rate=100.0) as mock:

        def make() -> Transport:
            if dialect == "grpc":
                return GrpcTransport(f"127.0.0.1:{mock.grpc_port}", Asking())
            return HttpTransport(f"127.0.0.1:{mock.http_port}", Asking(model="mock"))

        async def kill(client: LoadClient, tally: Tally) -> None:
            while tally.num_tokens < 50:
                await asyncio.sleep(0.01)
            os.kill(mock.pid, signal.SIGKILL)

        feed = Feed(even_workload(10_000, 50.0, 100_000))
        client, tally, _ = run(make, feed, during=kill, ask=False)
    assert client.died and tally.num_failed > 0 and tally.num_sent < 10_000
    assert tally.num_done == 0 and tally.num_tokens >= 50


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def event(text: str, **fields) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": None} | fields
    return b"data: " + json.dumps({"choices": [choice]}).encode()


USAGE = b'data:{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\r\n\r\n'
DONE = b"data: [DONE]\n\n"
LAST = event("c", finish_reason="stop")


@asynccontextmanager
async def answering(answer: bytes, *, piece: int = 10**6, keep: bool = True):
    """An HTTP server that says the same to everybody, in pieces of so many bytes."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            while True:
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(size)
                for place in range(0, len(answer), piece):
                    writer.write(answer[place : place + piece])
                    await writer.drain()
                    await asyncio.sleep(0)
                if not keep:
                    break
                head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"


async def ask_once(url: str, times: int = 1):
    """The last of `times` answers, what it brought, and how its tokens were counted."""
    transport = HttpTransport(url, Asking(model="any"))
    prepared = transport.prepare(work(0), np.arange(3, dtype=np.int32))
    told: list[int] = []
    for _ in range(times):
        told.clear()
        ending = await transport.send(prepared, 10.0, lambda _, tokens: told.append(tokens))
    await transport.close()
    return ending, told, transport.counted


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_events_of_another_server_are_read_however_they_are_cut(piece):
    body = event("a") + b"\n\n: a comment\n\n" + event("b") + b"\r\n\r\n" + LAST + b"\n\n" + USAGE
    body += DONE

    async def ask():
        answer = CHUNKED + chunks(body[:11], body[11:200], body[200:])
        async with answering(answer, piece=piece) as url:
            return await ask_once(url, times=2)

    ending, tokens, counted = asyncio.run(ask())
    assert (ending.reason, ending.prompt_tokens, ending.fault) == ("stop", 3, "")
    assert tokens == [3, 2, 2]  # seven by usage, over three events
    assert counted == "usage, spread evenly over the answer's events (2 answers)"


@pytest.mark.parametrize(
    ("answer", "keep", "reason", "fault", "tokens"),
    [
        # No usage; the end of the connection is the end of the answer.
        (
            b"HTTP/1.1 200 OK\r\n\r\n" + event("a") + b"\n\n" + LAST + b"\n\n" + DONE,
            False,
            "stop",
            "",
            [1, 1],
        ),
        (CHUNKED + chunks(event("a") + b"\n\n" + DONE), True, "error", "cut short", [1]),
        (CHUNKED + b"5\r\nab", False, "error", "ConnectionResetError", []),
        (b"SMTP hello\r\n\r\n", True, "error", "ConnectionAbortedError", []),
        (
            CHUNKED + chunks(b'data: {"error": {"type": "timeout_error", "message": "late"}}\n\n'),
            True,
            "deadline",
            "timeout_error",
            [],
        ),
        (
            b'HTTP/1.1 429 No\r\nContent-Length: 30\r\n\r\n{"error": {"message": "full"}}',
            True,
            "refused",
            "HTTP 429",
            [],
        ),
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", True, "error", "HTTP 500", []),
    ],
)
def test_answers_that_are_cut_short_or_refused(answer, keep, reason, fault, tokens):
    async def ask():
        async with answering(answer, keep=keep) as url:
            return await ask_once(url)

    ending, got, _ = asyncio.run(ask())
    assert (ending.reason, ending.fault, got) == (reason, fault, tokens)


# ------------------------------------------------------------------------------ the client itself


def test_the_client_is_measured_against_the_mock_server():
    cores = sorted(os.sched_getaffinity(0))
    for dialect in DIALECTS:
        cost = measure(
            dialect,
            tokens_per_message=5,
            streams=20,
            stream_rate=50.0,
            answer_tokens=12,
            seconds=0.3,
            server_core=cores[0],
            client_core=cores[-1],
        )
        assert cost.num_failed == 0 and cost.streams > 0 and cost.messages_per_s > 0
        assert cost.messages_per_s <= cost.tokens_per_s <= 5 * cost.messages_per_s
        assert len(cost.line()) == len(cost.head())
    assert sorted(os.sched_getaffinity(0)) == cores


# ------------------------------------------------------------------------------ the command


def bench(*arguments: str) -> int:
    return launch.main(["bench", *arguments])


SMALL = (
    "--workload=independent",
    "--workload_options=prompt=16",
    "--workload_options=output=8",
    "--workload_options=clients=2",
)


@pytest.mark.parametrize("api", DIALECTS)
def test_the_command_reports_repeats(server, api, tmp_path, capfd):
    address = server.target if api == "grpc" else server.url
    code = bench(
        f"--server={address}",
        f"--api={api}",
        *SMALL,
        "--num_requests=6",
        "--rate=30",
        "--repeat=2",
        "--api_key=jsk-secret",
        f"--json={tmp_path / 'run.json'}",
    )
    out, err = capfd.readouterr()
    assert code == 0 and f"{api} at {address}: llama-14m" in err
    assert out.count("sent 6, answered 6, aborted 0, failed 0, without an end 0") == 2
    assert "over 2 runs" in out and "client lateness: P99" in out
    reports = [read_report(str(tmp_path / name)) for name in ("run.json", "run-2.json")]
    for report in reports:
        assert report.about.kind == "live" and report.numbers["completed"] == 6
        assert not any("jsk-secret" in value for value in report.about.configuration.values())
    assert "jsk-secret" not in out + err


def test_the_sweep_finds_the_knee_of_a_paced_server(server, capfd):
    """8 tokens in two slices: 4 rows make 40 requests/s. At 160, waits grow by 0.75 s a second."""
    code = bench(
        f"--server={server.target}",
        "--sweep",
        "--sweep_from=20",
        "--sweep_to=160",
        "--sweep_s=0.8",
        "--sweep_warm_up_s=0.3",
        "--sweep_share=0.75",
        "--sweep_tolerance=1",
        "--slo_ttft_ms=400",
        "--grace_s=0.5",
        *SMALL,
    )
    out, err = capfd.readouterr()
    assert code == 0 and "20 requests/s: keeps up" in err
    knee = float(out.split("knee: ")[1].split()[0])
    assert 20 <= knee <= 80, out + err


def test_a_live_run_stands_beside_its_simulation(server, profile, tmp_path, capfd):
    """On a device that takes what its profile says, little is left but the way to it and back."""
    path = tmp_path / "both.json"
    code = bench(
        f"--server={server.target}",
        *SMALL,
        "--num_requests=20",
        "--rate=20",
        "--against=simulate",
        f"--profile={profile}",
        f"--json={path}",
    )
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "live and simulated" in out
    errors = {row["name"]: row for row in json.loads(path.read_text())["against"]["errors"]}
    tokens = errors["output_tokens_per_s"]
    assert tokens["simulated"] == pytest.approx(tokens["live"], rel=0.3)
    assert errors["e2e_s.mean"]["simulated"] >= 2 * SLICE_S  # eight tokens in slices of four


def test_a_simulation_needs_a_profile_of_what_is_served(server, write_profile, capfd):
    other = write_profile("tiny", step_s=0.01)
    arguments = [f"--server={server.target}", *SMALL, "--num_requests=2", "--against=simulate"]
    assert bench(*arguments, f"--profile={other}") == 2
    assert "profile: got one of tiny; allowed: one of llama-14m" in capfd.readouterr().err


def test_a_simulation_needs_a_profile_of_as_many_devices(profile):
    facts = ServerFacts(
        model="llama-14m", num_pages=64, num_devices=2, configuration={"order": "fcfs"}
    )
    with pytest.raises(ConfigError, match="profile: got one of 1 devices; allowed: one of 2"):
        like_server(facts, SimConfig(), find_profile(profile))


@pytest.mark.parametrize("dispatch_s", [None, 3e-3])
def test_a_simulated_server_plans_with_what_the_live_one_measured(dispatch_s, profile):
    facts = ServerFacts(
        model="llama-14m", num_pages=64, configuration={"page_size": "16"}, dispatch_s=dispatch_s
    )
    deployment = like_server(facts, SimConfig(), find_profile(profile))
    workload = Workload(name="none", requests=lambda: iter(()), num_requests=0)
    fleet = build_fleet(workload, Feed(workload), deployment, Recorder())
    planned_with = next(fleet.cores()).config.dispatch_s
    # By the profile none, and so the least that is believed.
    assert planned_with == (dispatch_s or 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server=127.0.0.1:1"], "server: 127.0.0.1:1 does not answer over gRPC (UNAVAILABLE"),
        (["--server=127.0.0.1:1", "--api=openai"], "server: 127.0.0.1:1 does not answer as OpenAI"),
        (["--server=nowhere"], "server: got 'nowhere'; allowed: host:port"),
        (["--api=smtp"], "api: got 'smtp'; allowed: grpc, openai, openai-chat"),
        (["--sweep", "--repeat=2"], "repeat: got 2; allowed: 1, with --sweep"),
        (["--sweep_from=9", "--sweep_to=3"], "sweep_to: got 3.0; allowed: sweep_from (9) or more"),
        (["--against=luck"], "against: got 'luck'; allowed: simulate, or empty"),
        (["--client_keys=/no/file"], "client_keys: got '/no/file' ("),
        (["--sweep", "--loop=closed", "--concurrency=2"], "sweep: got true; allowed: false with"),
        (["--json=/no/where/x.json"], "json: got '/no/where/x.json'; allowed: a file in a"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, capfd):
    assert bench(*arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"jaxserve: {message}") and err.count("\n") == 1


def test_client_keys_are_read_and_never_shown(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# who=what\nacme=jsk-1\n\na=b=jsk-2\n")
    keys = read_client_keys(str(file))
    assert keys == {"acme": "jsk-1", "a=b": "jsk-2"}
    asking = Asking(api_key="other", keys=keys)
    assert [asking.key(client) for client in ("acme", "zoe")] == ["jsk-1", "other"]
    file.write_text("acme=jsk-1\nsecret\n")
    with pytest.raises(ConfigError, match="keys:2: allowed: lines of client=key") as caught:
        read_client_keys(str(file))
    assert "secret" not in str(caught.value)


def test_keys_and_clients_are_on_the_wire():
    asking = Asking(api_key="k", keys={"acme": "jsk-1"}, model="m")
    acme = replace(work(3), client="acme", priority=2)
    body = HttpTransport("127.0.0.1:1", asking).prepare(acme, np.array([5, 6], np.int32))
    head, _, data = body.partition(b"\r\n\r\n")
    assert b"Authorization: Bearer jsk-1" in head
    fields = json.loads(data)
    assert (fields["user"], fields["prompt"], fields["priority"]) == ("acme", [5, 6], 2)
    assert fields["ignore_eos"] and fields["stream_options"] == {"include_usage": True}
    plain = HttpTransport("h:1", Asking(ignore_eos=False, name_clients=False))
    fields = json.loads(plain.prepare(acme, np.array([5], np.int32)).partition(b"\r\n\r\n")[2])
    assert "ignore_eos" not in fields and "user" not in fields
