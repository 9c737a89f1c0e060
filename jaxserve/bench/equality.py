"""Token equality in float32: the engine's tokens against a plain full-recompute loop, cell by cell.

A cell is one way of running the same requests: slice length, batch, prefix cache warm or not,
preempted or not, prompts whole or in chunks. Every cell must give every request the same tokens.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxserve.config import SchedulerConfig
from jaxserve.engine.batch import BatchShape
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.compile_count import CompileCount
from jaxserve.engine.core import EngineCore, sample_seed
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.devices import open_mesh
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.sequence import Phase
from jaxserve.engine.statistics import EngineStatistics
from jaxserve.kernels.backend import PALLAS_TPU
from jaxserve.models.config import ModelConfig
from jaxserve.models.sources import load_model_config, load_weights, parse_source
from jaxserve.request import Limits, Request, SamplingParams
from jaxserve.schedulers.prefix_tree import page_keys
from jaxserve.testing import FullRecompute

TILE = 32
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """One way of running the requests. `steps` 0 stands for the adaptive slice length."""

    steps: int
    rows: int
    prefix_hit: bool
    preempted: bool
    chunked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Requests, and the cells to run them in. A step takes in `tiles` tiles of prompts at most."""

    model: str
    num_prompts: int
    max_tokens: int
    steps: Sequence[int]
    rows: Sequence[int]
    longest_prompt: int = 120
    tiles: int = 8

    def cells(self) -> Iterator[Cell]:
        flags = (False, True)
        for values in itertools.product(self.steps, self.rows, flags, flags, flags):
            yield Cell(*values)


class EqualityCheck:
    """Compiles one executor and runs every cell on it. `options` are XLA's, by name."""

    def __init__(
        self,
        grid: Grid,
        *,
        seed: int = 0,
        kernels: str = "auto",
        mesh: str = "tp=1",
        kv_dtype: str = "float32",
        options: Mapping[str, Any] | None = None,
    ):
        self._grid, self._kernels = grid, kernels
        source = parse_source(grid.model)
        self._config = load_model_config(source)
        weights = load_weights(source, self._config, dtype="float32", seed=seed)
        self._requests = make_requests(self._config, grid, seed=seed)
        longest = max(request.prompt.size for request in self._requests) + grid.max_tokens
        self._pages_per_row = -(-longest // PAGE_SIZE)
        most_rows, most_steps = max(grid.rows), max(*grid.steps, 1)
        self._chunk_tokens = {False: grid.tiles * TILE, True: TILE}
        self._shape = BatchShape(
            tile=TILE,
            table_pages=self._pages_per_row,
            step_buffer=most_steps,
            max_rows=most_rows,
        )
        self._num_pages = (most_rows + 8) * self._pages_per_row
        self._executor = JaxExecutor(
            self._config,
            weights,
            mesh=open_mesh(mesh, self._config),
            shape=self._shape,
            buckets=few_buckets(grid.rows, self._chunk_tokens[False] // TILE),
            num_pages=self._num_pages,
            page_size=PAGE_SIZE,
            kernels=kernels,
            dtype="float32",
            kv_dtype=kv_dtype,
        )
        self._executor.compile_all(lambda _: None, threads=2, options=options)
        self._weights, self._longest = weights, longest

    @cached_property
    def expected(self) -> list[list[int]]:
        """The tokens of each request, by recomputing everything."""
        recompute = FullRecompute(self._config, self._weights, length=self._longest)
        return recompute.generate(
            [request.prompt for request in self._requests],
            [request.params for request in self._requests],
            [sample_seed(request.params.seed or 0, 0) for request in self._requests],
        )

    def tokens(self, cell: Cell) -> dict[str, list[int]]:
        """Run one cell; returns the tokens of each request.

        A prefix hit means that all requests ran before and their pages are still cached. Raises
        AssertionError when a page was lost.
        """
        core = EngineCore(self._core_config(cell))
        if cell.prefix_hit:
            self._generate(core, replace(cell, preempted=False), self._requests)
        made = self._generate(core, cell, self._requests)
        core.pool.check()
        return made

    def run(self, cell: Cell) -> int:
        """Run one cell; returns how many tokens were compared.

        Raises AssertionError naming the first fault.
        """
        made = self.tokens(cell)
        for request, wanted in zip(self._requests, self.expected, strict=True):
            got = made[request.request_id]
            if got != wanted:
                place = next(
                    (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
                    min(len(got), len(wanted)),
                )
                raise AssertionError(
                    f"{cell}: {request.request_id} differs at output token {place}:"
                    f" got {got[place : place + 3]}, wanted {wanted[place : place + 3]}"
                )
        return sum(len(tokens) for tokens in self.expected)

    def serve(self, cell: Cell, requests: Sequence[Request]) -> EngineStatistics:
        """Run other requests on the same programs, each of at most as many samples as rows.

        Raises AssertionError when anything was compiled meanwhile.
        """
        core = EngineCore(self._core_config(cell))
        self._generate(core, cell, requests)
        return core.statistics()

    def run_all(self, progress: Callable[[str], None]) -> tuple[int, int]:
        """Run the whole grid; returns (cells, tokens compared)."""
        cells = list(self._grid.cells())
        tokens, started_s = 0, time.monotonic()
        for done, cell in enumerate(cells, 1):
            tokens += self.run(cell)
            seconds = time.monotonic() - started_s
            progress(f"{done}/{len(cells)} cells equal, {tokens} tokens, {seconds:.0f} s: {cell}")
        return len(cells), tokens

    def _core_config(self, cell: Cell) -> CoreConfig:
        slicing = "fixed" if cell.steps else "adaptive"
        config = self._config
        return CoreConfig(
            limits=Limits(
                vocab_size=config.vocab_size, max_context=config.max_context, max_samples=cell.rows
            ),
            model_key=config.name,
            num_pages=self._num_pages,
            page_size=PAGE_SIZE,
            tile=TILE,
            scheduler=SchedulerConfig(
                slicing=slicing,
                slice_steps=cell.steps or self._shape.step_buffer,
                max_rows=cell.rows,
                max_prefill_tokens=self._chunk_tokens[cell.chunked],
                queue_timeout_s=0.0,
            ),
        )

    def _generate(
        self, core: EngineCore, cell: Cell, requests: Sequence[Request]
    ) -> dict[str, list[int]]:
        made: dict[str, list[int]] = {request.request_id: [] for request in requests}
        count = CompileCount()
        count.start_serving()
        rng, flights = np.random.default_rng(1), []
        for request in requests:
            core.submit(request, time.monotonic())
        while not core.idle:
            plan = core.next_slice(time.monotonic())
            if plan is not None:
                flights.append(self._executor.dispatch(plan))
                continue
            core.complete(self._executor.wait(flights.pop(0)), time.monotonic())
            for delta in core.take_deltas():
                made[delta.request_id] += delta.tokens
            if cell.preempted and rng.random() < 0.1:
                preempt_someone(core, rng)
        num_compiled = count.compiles().serving
        # What interprets TPU kernels compiles its own steps as it goes.
        if num_compiled and self._kernels != PALLAS_TPU:
            raise AssertionError(f"{cell}: {num_compiled} programs were compiled while serving")
        return made


def few_buckets(rows: Sequence[int], max_tiles: int) -> tuple[Bucket, ...]:
    """A decode program for each batch, one mixed program: enough, and soon compiled."""
    return (*(Bucket(each, 0) for each in sorted(rows)), Bucket(max(rows), max_tiles))


def preempt_someone(core: EngineCore, rng: np.random.Generator) -> None:
    """Take the rows of a random running request away, as a shortage of pages would."""
    jobs = [core.jobs[number] for number in core.order.running()]
    able = [job for job in jobs if all(row.phase is not Phase.EVICTING for row in job.rows())]
    if able:
        core.preempt(able[int(rng.integers(len(able)))])


def make_requests(config: ModelConfig, grid: Grid, *, seed: int) -> list[Request]:
    """Random prompts, greedy and sampled in turn, some sharing a prefix, all of forced length."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, config.vocab_size, 3 * PAGE_SIZE)
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        {"temperature": 1.0},
        {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.4, "min_p": 0.01},
    )
    requests = []
    for number in range(grid.num_prompts):
        prompt = rng.integers(0, config.vocab_size, rng.integers(1, grid.longest_prompt))
        if number % 3 == 0:
            prompt = np.concatenate([shared, prompt])
        prompt = prompt.astype(np.int32)
        keys = page_keys(prompt, page_size=PAGE_SIZE, scope="all", model=config.name)
        requests.append(
            Request(
                request_id=f"request-{number}",
                prompt=prompt,
                params=SamplingParams(
                    max_tokens=grid.max_tokens,
                    ignore_eos=True,
                    seed=int(rng.integers(0, 2**62)),
                    **kinds[number % len(kinds)],
                ),
                page_keys=tuple(keys),
                scope="all",
            )
        )
    return requests


_MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    {"logprobs": 0},
    {"logprobs": 5, "n": 2},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    {"logit_bias": {3: 4.0}},
    {"min_tokens": 4, "stop_token_ids": (1, 2, 3)},
    {"n": 3},
)


def make_mixed_requests(max_samples: int) -> list[Request]:
    """Every kind of sampling, with short, long and shared prompts of token ids below 200."""
    rng, requests = np.random.default_rng(0), []
    for number in range(3 * len(_MIXED)):
        prompt = rng.integers(0, 200, (3, 20, 70)[number % 3]).astype(np.int32)
        prompt[: 3 * PAGE_SIZE] = np.arange(prompt[: 3 * PAGE_SIZE].size)
        fields = {"n": 1, **_MIXED[number % len(_MIXED)]}
        fields["n"] = min(fields["n"], max_samples)
        requests.append(
            Request(
                request_id=f"mixed-{number}",
                prompt=prompt,
                params=SamplingParams(max_tokens=4 + number, **fields),
                page_keys=tuple(page_keys(prompt, page_size=PAGE_SIZE, scope="all", model="m")),
                scope="all",
            )
        )
    return requests
