"""The OpenAI client's checks against real servers: one that samples, and one that cannot."""

import asyncio
from pathlib import Path

from jaxserve.bench.openai_check import Row, check_server, failures, make_table
from jaxserve.bench.peers.jaxserve_peer import serving
from jaxserve.server.identity import make_key
from jaxserve.server.key import entry
from jaxserve.server_config import KeyConfig

FEW_ROWS = ("--max_rows=4", "--max_prefill_tokens=64", "--compilation_cache=")


def check(*flags: str, api_key: str = "") -> list[Row]:
    """The rows of a run against a server of its own."""
    with serving([*FEW_ROWS, *flags], model="demo") as server:
        return asyncio.run(check_server(server.url, api_key=api_key, model="demo"))


def test_every_parameter_of_the_openai_client_is_honoured_or_refused(tmp_path: Path):
    key, keys = make_key(), tmp_path / "keys.toml"
    keys.write_text(entry(KeyConfig(client="checker"), key))
    rows = check("--mesh=tp=1", f"--api_keys={keys}", api_key=key)
    assert failures(rows) == []
    assert {row.verdict for row in rows} == {"honoured", "accepted", "refused"}
    assert make_table(rows).row_count == len(rows) > 80


def test_a_server_that_ignores_parameters_is_told_of():
    """Scripted tokens, whatever is asked for: so nothing that draws tokens has an effect."""
    rows = check("--executor=mock")
    failed = {row.parameter for row in rows if row.errors}
    assert {"temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "logprobs"} <= failed
    assert not failed & {"stream", "max_tokens", "user", "tools", "service_tier", "request_id"}
