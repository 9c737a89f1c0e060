"""The executor that owns the devices: compiled slice programs, weights and state.

One program runs on all devices of a mesh, each with its share of heads, MLP and vocabulary; page
ids and everything a plan says are the same on all. Every program is compiled ahead of time and
called as such, so that a shape that was not warmed up is an error and never a silent compilation.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxserve.engine.batch import BatchShape, Packer
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.plan import RowStart, SliceLogprobs, SlicePlan, SliceResult
from jaxserve.engine.programs import EXTRAS, PAGE_COPIES, Program, Programs, Progress
from jaxserve.engine.slice_program import SliceOutput
from jaxserve.kernels.sampling import PROMPT_FLAG
from jaxserve.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class _Ticket:
    plan: SlicePlan
    bucket: Bucket
    order: np.ndarray
    output: Future[SliceOutput]
    wants_logprobs: bool
    dispatched_s: float


class JaxExecutor:
    """Runs slice plans on the devices of a mesh with the axis TP.

    `compile_all` must come before `dispatch`. Raises ConfigError when the model cannot be cut so.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Any,
        *,
        mesh: Mesh,
        shape: BatchShape,
        buckets: tuple[Bucket, ...],
        num_pages: int,
        page_size: int,
        kernels: str,
        dtype: str,
        kv_dtype: str | None = None,
    ):
        self._programs = Programs(
            config,
            mesh=mesh,
            shape=shape,
            buckets=buckets,
            num_pages=num_pages,
            page_size=page_size,
            kernels=kernels,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
        self._weights = self._programs.take_weights(weights)
        self._state = self._programs.make_state()
        self._compiled: dict[Any, Any] = {}
        self._config, self._shape, self.buckets = config, shape, buckets
        self._packer = Packer(shape, buckets, num_pages=num_pages, page_size=page_size)
        self._num_pages = num_pages
        self._dirty = np.zeros(shape.max_rows, bool)
        # Starting a program of several CPU devices blocks while another one runs (jax 0.10.2), and
        # the host has better things to do.
        blocks = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="launch") if blocks else None
        self._ready_s = 0.0

    def compile_all(
        self, progress: Progress, *, threads: int, options: Mapping[str, Any] | None = None
    ) -> None:
        """Compile every program, `threads` at a time. `options` are XLA's, by name."""
        compile = partial(Program.compile, options=options)
        self._compiled = self._programs.compile_all(progress, threads=threads, compile=compile)

    @property
    def num_programs(self) -> int:
        return len(self._compiled)

    def dispatch(self, plan: SlicePlan) -> _Ticket:
        """Upload the plan and start its slice; returns before it is done."""
        now_s = time.monotonic()
        bucket, buffer, order = self._packer.pack(plan)
        if self._launcher is not None:
            output = self._launcher.submit(self._launch, plan, bucket, buffer)
        else:
            output = Future()
            output.set_result(self._launch(plan, bucket, buffer))
        return _Ticket(plan, bucket, order, output, self._packer.wants_logprobs(plan), now_s)

    def _launch(self, plan: SlicePlan, bucket: Bucket, buffer: np.ndarray) -> SliceOutput:
        if plan.copies:
            self._copy_pages(plan.copies)
        for row in plan.rows:
            if row.start is not None:
                self._prepare_extras(row.slot, row.start)
        self._state, output = self._compiled[bucket](self._weights, self._state, buffer)
        output.packed.copy_to_host_async()
        return output

    def wait(self, ticket: _Ticket) -> SliceResult:
        """Block until a slice is done, and bring its tokens into the plan's order."""
        output = ticket.output.result()
        packed = np.asarray(output.packed)
        ready_s = time.monotonic()
        busy_since_s, self._ready_s = max(ticket.dispatched_s, self._ready_s), ready_s
        rows, steps = ticket.bucket.rows, self._shape.step_buffer
        tokens = packed[: steps * rows].reshape(steps, rows)
        counts, codes = packed[steps * rows : -1].reshape(2, rows)
        place = np.argsort(ticket.order)
        steps_run = int(packed[-1])
        of_row = tokens[:steps_run, place].T.tolist()
        return SliceResult(
            number=ticket.plan.number,
            steps_run=steps_run,
            tokens=[made[:n] for made, n in zip(of_row, counts[place].tolist(), strict=True)],
            codes=codes[place].tolist(),
            slice_s=ready_s - busy_since_s,
            rows_run=rows,
            prefill_run=ticket.bucket.tiles * self._shape.tile,
            logprobs=_read_logprobs(output, steps_run, place) if ticket.wants_logprobs else None,
        )

    def _copy_pages(self, copies: tuple[tuple[int, int], ...]) -> None:
        most, total = self._shape.max_rows, self._state.pages.num_pages
        first_page = np.arange(0, total, self._num_pages, dtype=np.int32)  # of each layer
        for first in range(0, len(copies), most):
            some = np.array(copies[first : first + most], np.int32).T
            ids = np.full((2, most, first_page.size), total, np.int32)
            ids[:, : some.shape[1]] = some[:, :, None] + first_page
            self._state = self._compiled[PAGE_COPIES](self._state, *ids.reshape(2, -1))

    def _prepare_extras(self, slot: int, start: RowStart) -> None:
        """Give the slot its bias and counts, or clear those of the row that had it before."""
        wanted = start.params.needs_extras
        if not wanted and not self._dirty[slot]:
            return
        counts = np.zeros(self._config.vocab_size, np.int32)
        bias = np.zeros(self._config.vocab_size, np.float32)
        if wanted:
            np.add.at(counts, np.array(start.made, np.int64), 1)
            counts[start.prompt] |= PROMPT_FLAG
            for token, value in start.params.logit_bias.items():
                bias[token] = value
        self._dirty[slot] = wanted
        self._state = self._compiled[EXTRAS](self._state, np.int32(slot), counts, bias)


def _read_logprobs(output: SliceOutput, steps_run: int, place: np.ndarray) -> SliceLogprobs:
    arrays = (output.logprob_SB, output.top_ids_SBN, output.top_logprobs_SBN)
    return SliceLogprobs(*(np.asarray(array)[:steps_run, place] for array in arrays))
