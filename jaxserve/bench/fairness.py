"""One greedy client beside polite ones on a live server: who is served, and what is found cached.

Every client has prompts of its own that begin with one of a few long prefixes. All keep streams
open in a closed loop, more than there are rows, so that somebody of each always waits, whoever
runs; the greedy one keeps several times as many.
The pool is too small for all prefixes, so that an order that jumps between them finds less cached.

Service is priced as in papers.md 0.2: computed prompt tokens, and output tokens twice.
"""

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from jaxserve.bench.peers.jaxserve_peer import serving
from jaxserve.client import AsyncClient
from jaxserve.request import SamplingParams
from jaxserve.schedulers.jain import jain

POLITE: Final = ("polite-1", "polite-2", "polite-3")
GREEDY: Final = "greedy"
W_OUT: Final = 2.0
PREFIXES: Final = 6
PREFIX_TOKENS: Final = 256
OWN_TOKENS: Final = 32
OUTPUT_TOKENS: Final = 32
FLAGS: Final = ("--max_rows=8", "--num_pages=64", "--max_prefill_tokens=512")


@dataclass(slots=True)
class Served:
    """What one client got in the measured window; latencies are seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def service(self) -> float:
        return self.prompt_tokens - self.cached_tokens + W_OUT * self.output_tokens


@dataclass(frozen=True, slots=True)
class Fairness:
    """One order's run."""

    order: str
    window_s: float
    served: dict[str, Served]

    @property
    def jain(self) -> float | None:
        """Of service, over all clients: all had demand throughout. None where nobody got any."""
        return jain([served.service for served in self.served.values()])

    @property
    def hit_rate(self) -> float:
        """Prompt tokens found cached."""
        prompt = sum(served.prompt_tokens for served in self.served.values())
        return sum(served.cached_tokens for served in self.served.values()) / prompt

    @property
    def tokens_per_s(self) -> float:
        return sum(served.output_tokens for served in self.served.values()) / self.window_s

    def latency_s(self, client: str) -> float:
        """Mean time from a request to its end; none ended: infinite."""
        latencies = self.served[client].latencies_s
        return float(np.mean(latencies)) if latencies else float("inf")


def measure(
    order: str,
    options: tuple[str, ...] = (),
    *,
    model: str = "demo",
    warm_s: float = 5.0,
    window_s: float = 20.0,
    polite_streams: int = 16,
    greedy_streams: int = 64,
) -> Fairness:
    """Serve with an order, load it, and count what ends inside the window."""
    flags = [*FLAGS, f"--order={order}", *(f"--order_options={option}" for option in options)]
    streams = dict.fromkeys(POLITE, polite_streams) | {GREEDY: greedy_streams}
    with serving(flags, model=model) as server:
        served = asyncio.run(_load(server.target, streams, warm_s, window_s))
    return Fairness(order, window_s, served)


async def _load(
    target: str, streams: dict[str, int], warm_s: float, window_s: float
) -> dict[str, Served]:
    rng = np.random.default_rng(0)
    served = {name: Served() for name in streams}
    begins_s = time.monotonic() + warm_s
    ends_s = begins_s + window_s

    async def stream(name: str, client: AsyncClient, prefixes: np.ndarray) -> None:
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=0.0)
        while True:
            prefix = prefixes[rng.integers(PREFIXES)]
            prompt = [*prefix.tolist(), *rng.integers(3, 2000, OWN_TOKENS).tolist()]
            sent_s = time.monotonic()
            done = await client.generate_once(prompt, sampling=sampling)
            ended_s = time.monotonic()
            if begins_s <= ended_s < ends_s:
                counts = served[name]
                counts.prompt_tokens += done.usage.prompt_tokens
                counts.cached_tokens += done.usage.cached_tokens
                counts.output_tokens += done.usage.completion_tokens
                counts.latencies_s.append(ended_s - sent_s)

    async with AsyncExitStack() as stack:
        tasks = []
        for name, number in streams.items():
            client = await stack.enter_async_context(AsyncClient(target, client=name))
            prefixes = rng.integers(3, 2000, (PREFIXES, PREFIX_TOKENS))
            tasks += [asyncio.create_task(stream(name, client, prefixes)) for _ in range(number)]
        ended, _ = await asyncio.wait(
            tasks, timeout=ends_s - time.monotonic(), return_when=asyncio.FIRST_EXCEPTION
        )
        for task in tasks:
            task.cancel()
        for task in ended:
            task.result()  # streams end by an error alone
    return served
