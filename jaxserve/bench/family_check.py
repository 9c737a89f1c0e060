"""Serves a model directory and asks it over curl, the openai client and gRPC: one greedy answer.

All must say the same, streamed or not. Needs the `openai` package and the program curl.
"""

import json
import subprocess
from dataclasses import dataclass
from typing import Any, Final

from jaxserve.bench.peers.jaxserve_peer import serving
from jaxserve.client import Client
from jaxserve.request import SamplingParams

MAX_TOKENS: Final = 24
QUESTION: Final = "Where is he?"


@dataclass(frozen=True, slots=True)
class FamilyAnswer:
    """What a served directory said to `QUESTION` as a chat, and to its text as a prompt."""

    model: str
    chat: str
    completion: str


def check_family(model: str, flags: list[str]) -> FamilyAnswer:
    """Serve `model`, a `--model`, and ask. Raises AssertionError where dialects disagree."""
    import openai

    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    wanted: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0}
    with serving(flags, model=model) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        (name,) = (found.id for found in client.models.list())
        by_curl = _curl(f"{server.url}/chat/completions", {"messages": messages, **wanted})
        chat = by_curl["choices"][0]["message"]["content"]
        whole = client.chat.completions.create(model=name, messages=messages, **wanted)
        assert whole.choices[0].message.content == chat, (whole, chat)
        chunks = client.chat.completions.create(
            model=name, messages=messages, stream=True, **wanted
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == chat, (streamed, chat)
        with Client(server.target) as grpc_client:
            done = grpc_client.generate_once(
                QUESTION, sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
            )
        completion = client.completions.create(model=name, prompt=QUESTION, **wanted)
        assert completion.choices[0].text == done.text, (completion, done)
    return FamilyAnswer(name, chat, done.text)


def _curl(url: str, body: dict[str, object]) -> dict:
    command = ["curl", "--silent", "--fail-with-body", url, "--data", json.dumps(body)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
