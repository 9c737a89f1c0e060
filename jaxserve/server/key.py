"""`jaxserve key`: a fresh API key to stderr, its entry for the key file to stdout."""

import json
import sys

from jaxserve.flags import Settings
from jaxserve.server.identity import key_digest, make_key
from jaxserve.server_config import KeyConfig


def main(settings: Settings) -> int:
    """Print both; returns the exit code. Raises ConfigError for what the user can mend."""
    config = settings.record(KeyConfig)
    key = make_key()
    print(f"API key of {config.client}, shown this once:\n{key}", file=sys.stderr, flush=True)
    print(entry(config, key), flush=True)
    return 0


def entry(config: KeyConfig, key: str) -> str:
    """The [[keys]] table of `key`, which it holds by digest only."""
    lines = [
        "[[keys]]",
        # TOML's basic strings escape as JSON's do.
        f"client = {json.dumps(config.client, ensure_ascii=False)}",
        f'sha256 = "{key_digest(key)}"',
        f"weight = {config.weight!r}",
    ]
    if config.priorities:
        lines.append(f"priority = {config.priorities}")
    return "\n".join(lines) + "\n"
