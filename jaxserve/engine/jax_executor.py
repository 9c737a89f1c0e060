"""The executor that owns the devices: compiled slice programs, weights and state.

One program runs on all devices of a mesh, each with its share of heads, MLP and vocabulary; page
ids and everything a plan says are the same on all. Every program is compiled ahead of time and
called as such, so that a shape that was not warmed up is an error and never a silent compilation.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.batch import BatchShape, Packer
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.plan import RowStart, SliceLogprobs, SlicePlan, SliceResult
from jaxserve.engine.slice_program import DeviceState, SliceOutput, SliceProgram
from jaxserve.kernels.backend import resolve
from jaxserve.kernels.kv_pages import KvPages, copy_pages, init_pages
from jaxserve.kernels.sampling import PROMPT_FLAG
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, Init
from jaxserve.models.partition import TP, param_shardings, share_of

Progress = Callable[[str], None]

_EVERYWHERE: Any = PartitionSpec()
_CUT_BY_HEAD: Any = PartitionSpec(None, TP)
_STATE = DeviceState(
    KvPages(_CUT_BY_HEAD, _CUT_BY_HEAD), *[_EVERYWHERE] * (len(DeviceState._fields) - 1)
)


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
    ):
        share = share_of(config, mesh.size)
        axis = TP if mesh.size > 1 else None
        abstract = nnx.eval_shape(lambda: Decoder(share, init=Init(jnp.dtype(dtype)), axis=axis))
        graphdef, state = nnx.split(abstract)
        nnx.replace_by_pure_dict(state, jax.device_put(weights, param_shardings(mesh, weights)))
        self._weights, treedef = jax.tree.flatten(state)
        self._mesh, self._weight_specs = mesh, [leaf.sharding.spec for leaf in self._weights]
        self._config, self._shape, self.buckets = config, shape, buckets
        self._packer = Packer(shape, buckets)
        self._program = {
            bucket: SliceProgram(
                decoder_def=graphdef,
                treedef=treedef,
                bucket=bucket,
                shape=shape,
                eos_token_ids=config.eos_token_ids,
                num_layers=config.num_layers,
                window=config.sliding_window,
                loop_layers=resolve(kernels) == "cpu",
                kernels=kernels,
            )
            for bucket in buckets
        }
        self._compiled: dict[Bucket, Any] = {}
        self._state = self._initial_state(num_pages, page_size, jnp.dtype(dtype))
        self._num_pages = num_pages
        self._dirty = np.zeros(shape.max_rows, bool)
        # Starting a program of several CPU devices blocks while another one runs (jax 0.10.2), and
        # the host has better things to do.
        blocks = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="launch") if blocks else None
        self._ready_s = 0.0

    def _initial_state(self, num_pages: int, page_size: int, dtype: jnp.dtype) -> DeviceState:
        config, slots = self._config, self._shape.max_rows

        def zeros() -> DeviceState:
            dense = (slots, config.vocab_size)
            return DeviceState(
                pages=init_pages(
                    num_pages * config.num_layers,
                    page_size=page_size,
                    kv_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    dtype=dtype,
                ),
                last_token_R=jnp.zeros(slots, jnp.int32),
                length_R=jnp.ones(slots, jnp.int32),
                done_R=jnp.zeros(slots, bool),
                counts_RV=jnp.zeros(dense, jnp.int32),
                bias_RV=jnp.zeros(dense, jnp.float32),
            )

        place = jax.tree.map(lambda spec: NamedSharding(self._mesh, spec), _STATE)
        return jax.jit(zeros, out_shardings=place)()

    # Warm-up.

    def compile_all(self, progress: Progress, *, threads: int) -> None:
        """Compile every program, `threads` at a time; tracing is serial, compiling is not."""
        jobs: list[tuple[str, Callable[[], Any]]] = [
            (
                f"{b.rows} rows"
                + (f" + {b.tiles * self._shape.tile} prompt tokens" * bool(b.tiles)),
                lambda b=b: self._compile_bucket(b),
            )
            for b in reversed(self.buckets)
        ]
        jobs += [("page copies", self._compile_copy), ("sampling extras", self._compile_extras)]
        started_s = time.monotonic()
        with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
            futures = {pool.submit(job): name for name, job in jobs}
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                seconds = time.monotonic() - started_s
                progress(f"compiled {done}/{len(jobs)} ({futures[future]}) after {seconds:.1f} s")

    @property
    def num_programs(self) -> int:
        return len(self._compiled) + 2

    def _compile_bucket(self, bucket: Bucket) -> None:
        self._compiled[bucket] = self._compile(
            self._program[bucket].__call__,
            (self._weight_specs, _STATE, _EVERYWHERE),
            (_STATE, _EVERYWHERE),
            (self._weights, self._state, self._host_array(self._shape.size(bucket))),
            donate=1,
        )

    def _compile(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, args: Any, *, donate: int
    ) -> Any:
        """`function` as one program of all devices, each of which sees its own shards."""
        each = jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            # What the specs call equal everywhere is: sums and gathers make it so. The check would
            # need types for it on every loop carry.
            check_vma=False,
        )
        return jax.jit(each, donate_argnums=donate).lower(*args).compile()

    def _host_array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """What the host hands to every device."""
        where = NamedSharding(self._mesh, _EVERYWHERE)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def _compile_copy(self) -> None:
        ids = self._host_array(self._shape.max_rows * self._config.num_layers)
        specs = (_STATE, _EVERYWHERE, _EVERYWHERE)
        self._copy = self._compile(_copy_pages, specs, _STATE, (self._state, ids, ids), donate=0)

    def _compile_extras(self) -> None:
        vocab = self._config.vocab_size
        args = (
            self._state,
            self._host_array(),
            self._host_array(vocab),
            self._host_array(vocab, dtype=jnp.float32),
        )
        specs = (_STATE, *[_EVERYWHERE] * 3)
        self._extras = self._compile(_set_extras, specs, _STATE, args, donate=0)

    # Slices.

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
            self._state = self._copy(self._state, *ids.reshape(2, -1))

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
        self._state = self._extras(self._state, np.int32(slot), counts, bias)


def _copy_pages(state: DeviceState, source_N: jax.Array, target_N: jax.Array) -> DeviceState:
    return state._replace(pages=copy_pages(state.pages, source_N, target_N))


def _set_extras(
    state: DeviceState, slot: jax.Array, counts_V: jax.Array, bias_V: jax.Array
) -> DeviceState:
    return state._replace(
        counts_RV=state.counts_RV.at[slot].set(counts_V),
        bias_RV=state.bias_RV.at[slot].set(bias_V),
    )


def _read_logprobs(output: SliceOutput, steps_run: int, place: np.ndarray) -> SliceLogprobs:
    arrays = (output.logprob_SB, output.top_ids_SBN, output.top_logprobs_SBN)
    return SliceLogprobs(*(np.asarray(array)[:steps_run, place] for array in arrays))
