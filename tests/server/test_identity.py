"""API keys: whose request it is, on gRPC and HTTP alike."""

import asyncio
import os
from pathlib import Path

import pytest

from jaxserve.client import AsyncClient, ServedTokens
from jaxserve.config import CacheConfig
from jaxserve.errors import BadRequest, ConfigError, Unauthenticated
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.server.clients import MOST_CLIENTS, OTHER, ClientLedger
from jaxserve.server.identity import Caller, Gate, key_digest, make_key, read_keys
from jaxserve.server.key import entry
from jaxserve.server_config import KeyConfig, ServerConfig

ANN, BOB = make_key(), make_key()


def write_keys(path: Path, text: str = "") -> Path:
    path.write_text(
        entry(KeyConfig(client="ann", weight=2.0, priority="0,10"), ANN)
        + "\n"
        + entry(KeyConfig(client='b"öb'), BOB)
        + text
    )
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys.toml")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ------------------------------------------------------------------------------------ the file


def test_what_the_key_command_writes_is_read_back(keys: Path):
    callers = read_keys(keys)
    assert ANN not in keys.read_text()
    assert callers[key_digest(ANN)] == Caller(
        client="ann", trusted=True, weight=2.0, priorities=(0, 10)
    )
    assert callers[key_digest(BOB)] == Caller(client='b"öb', trusted=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "wanted at least one"),
        ("keys = 3", "wanted at least one"),
        ("[[keys]]\nclient = 'a'", "entry 1: sha256: got something else"),
        (
            "[[keys]]\nclient = 'a'\nsha256 = 'jsk-a-key-by-mistake'",
            "entry 1: sha256: got something",
        ),
        (f"[[keys]]\nsha256 = '{'0' * 64}'", "entry 1: client: got None"),
        (f"[[keys]]\nclient = 'a'\nsha256 = '{'0' * 64}'\nweight = 0", "weight: got 0; allowed"),
        (f"[[keys]]\nclient = 'a'\nsha256 = '{'0' * 64}'\nweight = true", "weight: got True"),
        (f"[[keys]]\nclient = 'a'\nsha256 = '{'0' * 64}'\npriority = [3, 1]", "priority: got"),
        (f"[[keys]]\nclient = 'a'\nsha256 = '{'0' * 64}'\nrole = 'x'", "role: unknown; allowed"),
        (f"[[keys]]\nclient = 'a'\nsha256 = '{'0' * 64}'\n" * 2, "entry 2: sha256: got one that"),
        ("[[keys]\n", "no TOML"),
    ],
)
def test_a_damaged_file_is_refused_by_entry_and_field(tmp_path: Path, text: str, said: str):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Gate(path)
    assert said in str(caught.value) and "jsk-a-key-by-mistake" not in str(caught.value)


def test_a_clients_keys_must_agree(keys: Path):
    other = make_key()
    write_keys(keys, "\n" + entry(KeyConfig(client="ann", weight=2.0, priority="0,10"), other))
    assert read_keys(keys)[key_digest(other)].client == "ann"
    write_keys(keys, "\n" + entry(KeyConfig(client="ann", weight=3.0), make_key()))
    with pytest.raises(ConfigError, match="entry 3: client: got 'ann' with another weight"):
        read_keys(keys)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"api_keys: .*none\.toml: No such file"):
        Gate(tmp_path / "none.toml")


def test_keys_are_replaced_without_a_restart(keys: Path):
    now_s = 0.0
    gate = Gate(keys, clock=lambda: now_s)
    fresh = make_key()
    keys.write_text(entry(KeyConfig(client="cleo"), fresh))
    assert gate.identify(bearer(ANN)).client == "ann"  # looked at a moment ago
    now_s = 2.0
    assert gate.identify(bearer(fresh)).client == "cleo"
    with pytest.raises(Unauthenticated):
        gate.identify(bearer(ANN))
    keys.write_text("damaged")
    os.utime(keys, (1, 1))
    now_s = 4.0
    assert gate.identify(bearer(fresh)).client == "cleo"  # the keys before still count


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": ANN}, {"authorization": "Basic x"}, bearer("no")]
)
def test_no_key_no_entry(keys: Path, headers: dict[str, str]):
    with pytest.raises(Unauthenticated):
        Gate(keys).identify(headers, claimed="ann")


def test_without_a_file_the_word_is_taken_and_not_trusted():
    gate = Gate()
    caller = gate.identify({"x-jaxserve-client": "cleo", **bearer("anything")}, claimed="dan")
    assert caller == Caller(client="cleo", trusted=False)
    assert gate.identify({}).client == "anonymous"


def test_priorities_outside_the_keys_range_are_refused():
    caller = Caller(client="x", priorities=(2, 5))
    assert [caller.priority(wanted) for wanted in (0, 2, 5)] == [2, 2, 5]
    with pytest.raises(BadRequest, match="priority: got 6; allowed: 2 to 5"):
        caller.priority(6)


def test_only_this_machine_is_served_without_keys():
    for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        assert ServerConfig(host=host).host == host
    for host in ("0.0.0.0", "[::]", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="host: got .* unless --api_keys is set"):
            ServerConfig(host=host)
        assert ServerConfig(host=host, api_keys="keys.toml").host == host


def test_prefixes_are_the_clients_own_where_keys_are_in_use():
    assert CacheConfig().resolved(has_keys=True).prefix_scope == "client"
    assert CacheConfig().resolved(has_keys=False).prefix_scope == "all"
    assert CacheConfig(prefix_scope="all").resolved(has_keys=True).prefix_scope == "all"


# ----------------------------------------------------------------------------- over the sockets


async def test_keys_decide_on_both_dialects(serve, answer, keys: Path):
    async with (
        serve(script=answer([1, 2]), http=True, keys=keys) as served,
        AsyncClient(served.target, client="bob", api_key=ANN) as ann,
    ):
        await ann.generate_once([1])
        with pytest.raises(BadRequest, match="priority: got 11; allowed: 0 to 10"):
            await ann.generate_once([1], priority=11)
        for call in (
            served.client.generate_once([1]),
            served.client.models(),
            served.client.server_info(),
            served.client.statistics(),
            served.client.tokenize("x"),
            served.client.abort("x"),
        ):
            with pytest.raises(Unauthenticated):
                await call
        assert await served.client.is_serving()  # health needs no key
        # A free-text user cannot split a tenant, nor can it borrow another's name.
        body = {"prompt": "x", "user": "somebody else"}
        reply = await served.post("/v1/completions", body, authorization=f"Bearer {ANN}")
        assert reply.status == 200
        assert [submit.client for submit in served.replica.submits] == ["ann", "ann"]
        for headers in ({}, {"authorization": "Bearer wrong"}):
            reply = await served.post("/v1/completions", b"not even read", **headers)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert reply.json["error"]["code"] == "invalid_api_key"
            assert (await served.get("/v1/models", **headers)).status == 401
        assert (await served.get("/health")).status == 200
        codes = [(line["client"], line["trusted"], line["code"]) for line in served.log_lines()]
        assert codes[0] == ("ann", True, "OK")
        assert ("", False, "UNAUTHENTICATED") in codes
        assert not any(ANN in str(line) for line in served.log_lines())


async def test_nobody_ends_anothers_request(serve, keys: Path):
    async with (
        serve(keys=keys) as served,
        AsyncClient(served.target, api_key=ANN) as ann,
        AsyncClient(served.target, api_key=BOB) as bob,
    ):
        stream = ann.generate([1], request_id="hers")
        task = asyncio.create_task(anext(stream))
        await served.replica.next_submit()
        assert (await bob.abort("hers")).unknown == ("hers",)
        assert (await ann.abort("hers")).aborted == ("hers",)
        await task


async def test_counts_by_client_show_a_caller_its_own(serve, answer, keys: Path):
    async with (
        serve(script=answer([1, 2]), keys=keys) as served,
        AsyncClient(served.target, api_key=ANN) as ann,
        AsyncClient(served.target, api_key=BOB) as bob,
    ):
        await ann.generate_once([1, 2, 3])
        await ann.generate_once([1])
        await bob.generate_once([1])
        (replica,) = await ann.statistics(per_client=True)
        (counts,) = replica.clients
        assert (counts.client, counts.weight, counts.num_requests) == ("ann", 2.0, 2)
        assert (counts.prompt_tokens, counts.completion_tokens) == (4, 4)
        assert (await ann.statistics())[0].clients == ()


async def test_without_keys_everybody_is_shown(serve, answer):
    async with (
        serve(script=answer([1])) as served,
        AsyncClient(served.target, client="dan") as dan,
    ):
        await dan.generate_once([1])
        await served.client.generate_once([1])
        (replica,) = await dan.statistics(per_client=True)
        assert {counts.client for counts in replica.clients} == {"dan", "anonymous"}


def served_client(name: str, service: float) -> pb.ClientStatistics:
    served = pb.ServedTokens(computed=7, cached=2, output=5)
    return pb.ClientStatistics(
        client=name, weight=1.0, service=service, service_uncached=3.0, bound=50.0, served=served
    )


async def test_what_the_engine_served_stands_beside_what_was_asked_for(serve, answer):
    async with (
        serve(script=answer([1])) as served,
        AsyncClient(served.target, client="dan") as dan,
    ):
        served.replica.clients = [served_client("eve", 9.0), served_client("dan", 8.0)]
        await dan.generate_once([1, 2])
        (replica,) = await dan.statistics(per_client=True)
        eve, me = replica.clients
        assert (eve.client, eve.service, eve.num_requests) == ("eve", 9.0, 0)
        assert (me.client, me.service, me.service_uncached) == ("dan", 8.0, 3.0)
        assert (me.num_requests, me.prompt_tokens, me.completion_tokens) == (1, 2, 1)
        assert (me.served, me.credit, me.bound) == (ServedTokens(7, 2, 5), None, 50.0)
        stub = pb_grpc.JaxserveStub(served.channel)
        for fields, wanted in (({"client": "dan"}, ["dan"]), ({"most_clients": 1}, ["eve"])):
            request = pb.GetStatisticsRequest(per_client=True, **fields)
            (replica,) = (await stub.GetStatistics(request)).replicas
            assert [one.client for one in replica.clients] == wanted


async def test_with_keys_nobody_sees_whom_else_the_engine_served(serve, keys: Path):
    async with (
        serve(keys=keys) as served,
        AsyncClient(served.target, api_key=ANN) as ann,
    ):
        served.replica.clients = [served_client("bob", 9.0), served_client("ann", 8.0)]
        (replica,) = await ann.statistics(per_client=True)
        assert [(one.client, one.service) for one in replica.clients] == [("ann", 8.0)]


async def test_the_metrics_page_names_clients_unless_keys_are_in_use(serve, keys: Path):
    """The page needs no key."""
    for fields, named in (
        ({}, True),
        ({"client_metrics": "off"}, False),
        ({"keys": keys}, False),
        ({"keys": keys, "client_metrics": "on"}, True),
    ):
        async with serve(http=True, **fields) as served:
            served.replica.clients = [served_client("bob", 9.0)]
            page = (await served.get("/metrics")).body.decode()
            assert ('client="bob"' in page) is named
    with pytest.raises(ConfigError, match="client_metrics: got 'no'; allowed: auto, on, off"):
        ServerConfig(client_metrics="no")


def test_made_up_names_are_counted_together_beyond_a_bound():
    ledger = ClientLedger()
    for number in range(MOST_CLIENTS + 5):
        ledger.of(Caller(client=f"c{number}")).num_requests += 1
    counts = {one.client: one.num_requests for one in ledger.all()}
    assert len(counts) == MOST_CLIENTS + 1 and counts[OTHER] == 5
    assert ledger.of(Caller(client="keyed", trusted=True)).client == "keyed"
