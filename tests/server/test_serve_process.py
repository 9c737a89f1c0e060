"""`jaxserve serve` as a person runs it: real processes and sockets, mock and paced executors."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.client import AsyncClient, Client, ServedTokens
from jaxserve.errors import JaxserveError, NotReady
from jaxserve.request import FinishReason, SamplingParams
from jaxserve.server.identity import make_key
from jaxserve.server.key import entry
from jaxserve.server_config import KeyConfig

MODEL = "--model=random:llama-14m"
COMMAND = (sys.executable, "-m", "jaxserve")


class Server:
    """A server process; stdout and stderr go to files, so that nothing blocks on a pipe."""

    def __init__(self, directory: Path, *flags: str):
        self._out, self._err = directory / "out", directory / "err"
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", MODEL, "--port=0", "--num_pages=256", *flags],
                stdout=out,
                stderr=err,
                env=os.environ | {"TMPDIR": str(self.temporary)},
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_ready(self) -> str:
        """The address, once it is printed."""
        wait_until(lambda: "try: " in self.out or self.process.poll() is not None)
        found = re.search(r"serving gRPC at (\S+)\n", self.out)
        assert found, self.out + self.err
        return found[1]

    def wait_end(self) -> int:
        return self.process.wait(timeout=20)

    @property
    def engine_pid(self) -> int:
        (pid,) = children(self.process.pid)
        return pid


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def run_jaxserve(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=30, **options
    )


@pytest.fixture
def paced(write_profile):
    """Flags for an engine that makes a token in 10 ms."""
    profile = write_profile("llama-14m", step_s=0.01)
    return "--executor=paced", f"--profile={profile}", "--slicing=fixed", "--slice_steps=5"


class Answering(threading.Thread):
    """Streams `num_tokens` tokens in the background; `error` and `tokens` tell what came."""

    def __init__(self, address: str, num_tokens: int):
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.finish = None
        self.error: JaxserveError | None = None
        self._address, self._num_tokens = address, num_tokens
        self.start()
        wait_until(lambda: self.tokens or self.error)

    def run(self) -> None:
        sampling = SamplingParams(max_tokens=self._num_tokens, ignore_eos=True)
        try:
            with Client(self._address) as client:
                for chunk in client.generate([1, 2, 3], sampling=sampling):
                    self.tokens += chunk.token_ids
                    self.finish = chunk.finish
        except JaxserveError as error:
            self.error = error


def test_a_server_starts_answers_survives_its_engine_and_leaves_nothing(tmp_path):
    log = tmp_path / "requests.jsonl"
    with Server(tmp_path, "--executor=mock", f"--request_log={log}") as server:
        address = server.wait_ready()
        assert (
            "*num_pages=256" in server.out
            and "KV pool: 256 pages of 64 = 16384 tokens" in server.out
        )
        (pasted,) = re.findall(r"^try: jaxserve (.*)$", server.out, re.MULTILINE)
        pasted = pasted.split()

        done = run_jaxserve(*pasted, "--max_tokens=4")
        assert (done.returncode, done.stdout, done.stderr) == (0, "4 5 6 7 \n", "")
        done = run_jaxserve("generate", f"--server={address}", "--token_ids=1", "--max_tokens=0")
        assert done.returncode == 2 and done.stderr.startswith("jaxserve: max_tokens: got 0; ")
        done = run_jaxserve("generate", f"--server={address}", "--prompt=x", "--model=other")
        assert done.returncode == 1 and done.stderr.count("\n") == 1

        with Client(address) as client:
            killed = server.engine_pid
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: not client.is_serving())
            wait_until(client.is_serving)
            assert server.engine_pid != killed
            completion = client.generate_once([5], sampling=SamplingParams(max_tokens=2))
            assert completion.samples[0].token_ids == (6, 7)
            (replica,) = client.statistics(per_client=True)
            assert replica.engine_restarts == 1
            (anonymous,) = replica.clients
            # What was asked for is counted on, what was served begins again with the engine.
            assert anonymous.num_requests > 1 and anonymous.completion_tokens == 4 + 2
            assert anonymous.served == ServedTokens(computed=1, cached=0, output=2)
            assert anonymous.service == anonymous.service_uncached == 1 + 2 * 2
            assert anonymous.credit is None and anonymous.bound is None

        server.process.send_signal(signal.SIGTERM)
        assert server.wait_end() == 0
    assert "was killed by signal 9" in server.err and "Traceback" not in server.err
    assert list(server.temporary.iterdir()) == []
    codes = [json.loads(line)["code"] for line in log.read_text().splitlines()]
    assert codes == ["OK", "INVALID_ARGUMENT", "NOT_FOUND", "OK"]


def test_the_first_signal_lets_requests_finish_and_refuses_new_ones(tmp_path, paced):
    with Server(tmp_path, *paced) as server, Client(server.wait_ready()) as client:
        address = server.wait_ready()
        answer = Answering(address, 80)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: not client.is_serving())
        with pytest.raises(NotReady, match="draining"):
            client.generate_once([1])
        answer.join(20)
        assert answer.error is None and answer.finish.reason is FinishReason.LENGTH
        assert answer.tokens == list(range(4, 84))
        assert server.wait_end() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_http_client_that_leaves_gives_its_lease_back_within_two_slices(tmp_path, paced, stream):
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1000, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with Server(tmp_path, *paced) as server, Client(server.wait_ready()) as client:

        def now() -> dict:
            return dict(client.statistics()[0].values)

        url = re.search(r"serving HTTP at http://([\d.]+):(\d+)/v1", server.out)
        assert url is not None
        with socket.create_connection((url[1], int(url[2]))) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: now()["slices"] >= 3)
            assert now()["pool_leased"] > 0
            if stream:
                assert b"text/event-stream" in connection.recv(65536)
            slices = now()["slices"]
        wait_until(lambda: now()["pool_leased"] == 0 and now()["running"] == 0)
        # One more may have been dispatched before the connection was seen to end.
        assert now()["slices"] <= slices + 3


async def test_a_busy_server_is_shared_by_the_weights_of_the_keys(tmp_path, paced):
    weights = {"heavy": 3.0, "light": 1.0}
    secrets = {name: make_key() for name in weights}
    keys = tmp_path / "keys.toml"
    entries = [
        entry(KeyConfig(client=name, weight=weights[name]), secrets[name]) for name in weights
    ]
    keys.write_text("\n".join(entries))
    made = dict.fromkeys(weights, 0)
    sampling = SamplingParams(max_tokens=10, ignore_eos=True)

    async def ask(name: str, client: AsyncClient) -> None:
        while True:
            async for chunk in client.generate([1, 2], sampling=sampling):
                made[name] += len(chunk.token_ids)

    flags = ("--order=vtc", "--max_rows=2", f"--api_keys={keys}")
    with Server(tmp_path, *paced, *flags) as server:
        address = server.wait_ready()
        async with AsyncExitStack() as stack:
            for name, secret in secrets.items():
                client = await stack.enter_async_context(AsyncClient(address, api_key=secret))
                for _ in range(6):
                    task = asyncio.create_task(ask(name, client))
                    stack.callback(task.cancel)
            await asyncio.sleep(1)
            before = dict(made)
            await asyncio.sleep(4)
            served = {name: made[name] - before[name] for name in weights}
    assert served["light"] > 50
    # Ten tokens at a time: the shares come out in steps.
    assert 2.3 <= served["heavy"] / served["light"] <= 3.9


async def test_a_live_server_shows_whom_it_serves_and_keeps_the_gap_below_the_bound(
    tmp_path, paced
):
    """One greedy client beside two polite ones; each has a prefix that all its prompts share."""
    streams = {"greedy\n": 18, "polite-1": 6, "polite-2": 6}
    sampling = SamplingParams(max_tokens=10, ignore_eos=True)
    flags = ("--order=dlpm", "--order_options=quantum=64", "--max_rows=4", "--page_size=8")
    pages: list[dict] = []

    async def ask(client: AsyncClient, own: int) -> None:
        for number in range(10_000):
            await client.generate_once([own] * 24 + [number], sampling=sampling)

    with Server(tmp_path, *paced, *flags) as server:
        address = server.wait_ready()
        url = re.search(r"serving HTTP at (http://[\d.:]+)/v1", server.out)
        assert url is not None
        async with AsyncExitStack() as stack:
            tasks = []
            for own, (name, number) in enumerate(streams.items(), 1):
                client = await stack.enter_async_context(AsyncClient(address, client=name))
                tasks += [asyncio.create_task(ask(client, own)) for _ in range(number)]
            for _ in range(18):
                await asyncio.sleep(0.1)
                pages.append(await asyncio.to_thread(scrape, url[1]))
            (replica,) = await client.statistics(per_client=True)
            for task in tasks:
                task.cancel()
    name, service = "jaxserve_service_gap_tokens", "jaxserve_client_service_tokens_total"
    waited = [page for page in pages if page["jaxserve_clients_backlogged",] == len(streams)]
    assert len(waited) > 10 and len({page[name,] for page in waited}) > 3
    assert all(page[name,] <= page["jaxserve_service_gap_bound_tokens",] for page in pages)
    for client in replica.clients:
        assert len({page["jaxserve_client_deficit", client.client] for page in pages[3:]}) > 3
        for kind in ("all", "uncached"):
            totals = [page[service, client.client, kind] for page in pages[3:]]
            assert totals == sorted(totals) and totals[-1] > totals[0]
        assert client.service > client.service_uncached >= totals[-1]
        served = client.served
        assert client.service == served.computed + served.cached + 2 * served.output
        assert client.bound == replica.values["service_gap_bound_tokens"] > 0
        assert client.credit is not None and client.credit <= 64
    assert {client.client for client in replica.clients} == set(streams)


def scrape(url: str) -> dict:
    """The metrics page by name and labels, without those that all have."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        page = reply.read().decode()
    samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = {**sample.labels}
            del labels["model_name"], labels["engine"]
            samples[sample.name, *labels.values()] = sample.value
    return samples


def test_what_outlasts_drain_s_ends_with_unavailable(tmp_path, paced):
    with Server(tmp_path, *paced, "--drain_s=0.2") as server:
        answer = Answering(server.wait_ready(), 400)
        server.process.send_signal(signal.SIGTERM)
        answer.join(20)
        assert isinstance(answer.error, NotReady) and 0 < len(answer.tokens) < 400
        assert server.wait_end() == 0


def test_the_second_signal_ends_everything_at_once(tmp_path, paced):
    with Server(tmp_path, *paced) as server:
        Answering(server.wait_ready(), 400)
        engine = server.engine_pid
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in server.err)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_end() == 128 + signal.SIGTERM
        wait_until(lambda: not alive(engine), 3)
        assert list(server.temporary.iterdir()) == []


def test_an_engine_outlives_neither_signals_of_the_group_nor_its_parent(tmp_path):
    with Server(tmp_path, "--executor=mock") as server:
        server.wait_ready()
        engine = server.engine_pid
        os.kill(engine, signal.SIGINT)
        os.kill(engine, signal.SIGTERM)
        time.sleep(0.2)
        assert alive(engine)
        server.process.kill()
        wait_until(lambda: not alive(engine), 6)


def test_a_signal_before_ready_ends_with_0(tmp_path):
    with Server(tmp_path, "--executor=mock") as server:
        wait_until(lambda: children(server.process.pid))
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_end() == 0
        assert "serving gRPC" not in server.out


def test_a_port_in_use_is_told_before_an_engine_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run_jaxserve("serve", "--executor=mock", f"--port={port}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        f"jaxserve: port: got {port} on 127.0.0.1: Address already in use"
    )
    assert done.stderr.count("\n") == 1


def damaged(directory: Path) -> str:
    directory.mkdir()
    (directory / "config.json").write_text("{")
    return str(directory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: "orbax:/no/such/directory", "there is no directory"),
        (lambda path: "random:llama-15m", "allowed shapes"),
        (lambda path: "orbax:" + damaged(path / "damaged"), "config.json"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_2(tmp_path, make, message):
    done = run_jaxserve("serve", f"--model={make(tmp_path)}", "--port=0")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_generate_runs_an_engine_in_its_own_process():
    flags = (MODEL, "--executor=mock", "--num_pages=64")
    done = run_jaxserve("generate", *flags, "--token_ids=7,8", "--max_tokens=3")
    assert (done.returncode, done.stdout) == (0, "9 10 11 \n")
    done = run_jaxserve("generate", *flags, "--prompt=x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
