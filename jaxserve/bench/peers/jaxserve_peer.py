"""jaxserve as one of the engines compared: a real server, driven over loopback gRPC.

Server (front end and engine) and client share the cores that the peers have to themselves. Decode
alone is timed on the engine's own slice programs, as the peers' is on theirs.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from jaxserve.bench.peers.protocol import (
    DECODE_POINTS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    DecodeResult,
    Meter,
    emit,
    peer_arguments,
)
from jaxserve.bench.peers.workload import MAX_ROWS, Request, make_requests, warm_up_requests
from jaxserve.client import AsyncClient
from jaxserve.models.config import SHAPES
from jaxserve.request import SamplingParams

PEER = "jaxserve"
MODEL = "llama-14m"


def main() -> None:
    parser = peer_arguments(__doc__ or "")
    parser.add_argument("--serve_flag", action="append", default=[], help="passed to the server")
    parser.add_argument("--skip_decode", action="store_true", help="the workload only")
    options = parser.parse_args()
    with serving(options.serve_flag) as server:
        asyncio.run(run_workloads(server.target, options))
    if not options.skip_decode:
        for rows, context in DECODE_POINTS:
            rate = decode_alone(rows, context)
            emit(DecodeResult(peer=PEER, rows=rows, context=context, tokens_per_s=rate))


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: gRPC's address, HTTP's base URL, and the process that was started."""

    target: str
    url: str
    pid: int


@contextmanager
def serving(flags: list[str], *, model: str = f"random:{MODEL}") -> Iterator[Server]:
    """A server that is ready, for as long as the context lasts."""
    command = [sys.executable, "-m", "jaxserve", "serve", f"--model={model}", "--port=0"]
    command += [f"--max_rows={MAX_ROWS}", "--log_level=warning", *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAXSERVE_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = ""
        try:
            for line in process.stdout:
                said += line
                if line.startswith("try:"):
                    break
            else:
                raise RuntimeError("the server ended before it was ready")
            target, url = (
                said.split(f"serving {dialect} at ")[1].split()[0].rstrip(",")
                for dialect in ("gRPC", "HTTP")
            )
            yield Server(target, url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


async def run_workloads(target: str, options: argparse.Namespace) -> None:
    requests = make_requests(SHAPES[MODEL].vocab_size, count=options.requests, seed=options.seed)
    async with AsyncClient(target) as client:
        for mode in options.modes:
            await run_once(client, warm_up_requests(requests), mode, Meter())
            for _ in range(options.repeats):
                meter = Meter()
                await run_once(client, requests, mode, meter)
                config = {"rows": MAX_ROWS, "flags": options.serve_flag}
                emit(meter.result(PEER, mode, config=config))


async def run_once(
    client: AsyncClient, requests: tuple[Request, ...], mode: str, meter: Meter
) -> None:
    """All requests at once; the server's queue keeps what is beyond its rows."""
    sampling = (
        SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P)
        if mode == "sampled"
        else SamplingParams(temperature=0.0)
    )

    async def one(request: Request, seed: int) -> None:
        made = 0
        params = replace(sampling, max_tokens=request.output_tokens, ignore_eos=True, seed=seed)
        async for chunk in client.generate(request.prompt_ids, sampling=params):
            made += len(chunk.token_ids)
            meter.add(len(chunk.token_ids))
        if made != request.output_tokens:
            raise RuntimeError(f"asked for {request.output_tokens} tokens, got {made}")

    await asyncio.gather(*(one(request, seed) for seed, request in enumerate(requests)))


def decode_alone(rows: int, context: int, *, steps: int = 32, repeats: int = 5) -> float:
    """Greedy tokens/s of slices of `steps` steps, all rows around `context` tokens; the best."""
    from jaxserve.config import CacheConfig
    from jaxserve.engine.batch import BatchShape
    from jaxserve.engine.buckets import Bucket
    from jaxserve.engine.build import TILE
    from jaxserve.engine.devices import open_mesh
    from jaxserve.engine.jax_executor import JaxExecutor
    from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan
    from jaxserve.models.sources import load_weights, parse_source

    config, page_size, tile = SHAPES[MODEL], CacheConfig().page_size, TILE
    # The measured slices lie around `context`: half of them before, half after.
    half = (repeats + 1) * steps // 2
    start, longest = max(1, context - half), context + half + steps
    row_pages = -(-longest // page_size)
    mesh = open_mesh("auto", config)
    source = parse_source(f"random:{MODEL}")
    weights = load_weights(source, config, dtype="float32", seed=0, mesh=mesh)
    prompt_tiles = -(-start // tile)
    executor = JaxExecutor(
        config,
        weights,
        mesh=mesh,
        shape=BatchShape(
            tile=tile,
            table_pages=-(-config.max_context // page_size),
            step_buffer=steps,
            max_rows=rows,
        ),
        buckets=(Bucket(rows, 0), Bucket(rows, prompt_tiles)),
        num_pages=rows * row_pages,
        page_size=page_size,
        kernels="auto",
        dtype="float32",
    )
    executor.compile_all(lambda _: None, threads=2)
    rng = np.random.default_rng(0)
    pages = [list(range(row * row_pages, (row + 1) * row_pages)) for row in range(rows)]
    number = 0
    for row in range(rows):
        prompt = rng.integers(0, config.vocab_size, start).astype(np.int32)
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        begin = RowStart(params, 0, config.max_context, prompt, ())
        number += 1
        plan = RowPlan(row, 1, longest, pages[row], Chunk(prompt, 0), begin)
        executor.wait(executor.dispatch(SlicePlan(number, 1, 1, (plan,))))
    best_s = float("inf")
    for repeat in range(repeats + 1):
        number += 1
        plans = tuple(RowPlan(row, steps, longest, pages[row]) for row in range(rows))
        began_s = time.perf_counter()
        result = executor.wait(executor.dispatch(SlicePlan(number, steps, rows, plans)))
        assert result.steps_run == steps, result
        if repeat:
            best_s = min(best_s, time.perf_counter() - began_s)
    return rows * steps / best_s


if __name__ == "__main__":
    main()
