"""The compiled programs of a deployment: which there are, what each takes, how they are compiled.

Serving compiles and runs them (jax_executor.py); `jaxserve compile` compiles the same list for
devices that are not there, from shapes alone. Knows no plan and holds no array.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.batch import BatchShape
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.kernel_choice import init_layer
from jaxserve.engine.slice_program import DeviceState, SliceOutput, SliceProgram
from jaxserve.kernels.backend import CPU, is_interpreted, platform_of, resolve
from jaxserve.kernels.kv_pages import copy_pages
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, Init
from jaxserve.models.partition import (
    TP,
    axes_spec,
    param_shardings,
    share_of,
    spread,
    spread_config,
)

Progress = Callable[[str], None]
_Made = TypeVar("_Made")

_EVERYWHERE: Any = PartitionSpec()
_SIDE_BY_SIDE: Any = PartitionSpec(None, TP)
_PAGES: Any = axes_spec("pages", "kv_heads")

PAGE_COPIES, EXTRAS = "page copies", "sampling extras"


@dataclass(frozen=True, slots=True)
class Program:
    """One program to compile. `key` is its bucket, PAGE_COPIES or EXTRAS; `name` is for people.

    `args` are shapes with shardings; the one at `donated` is the `DeviceState`, which is given back
    changed.
    """

    key: Hashable
    name: str
    function: Any
    args: tuple[Any, ...]
    donated: int

    def compile(self, options: Mapping[str, Any] | None = None) -> Any:
        """Trace, lower and compile it for the devices of its arguments.

        `options` are XLA's, by name.
        """
        lowered = jax.jit(self.function, donate_argnums=self.donated).lower(*self.args)
        return lowered.compile(None if options is None else dict(options))


class Programs:
    """Everything that one deployment compiles, for the devices of a mesh with the axis TP.

    `config` becomes the model as it is spread over the mesh, `kernels` the backend that runs there.
    Raises ConfigError when the model cannot be cut so, ValueError when the backend does not run on
    the mesh's platform.
    """

    def __init__(
        self,
        config: ModelConfig,
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
        self.config = spread_config(config, mesh.size)
        self.mesh, self.shape, self.buckets = mesh, shape, buckets
        self.num_pages, self.page_size, self.dtype = num_pages, page_size, jnp.dtype(dtype)
        self.kv_dtype = kv_dtype or dtype
        platform = platform_of(mesh.devices.flat[0])
        self.kernels = resolve(kernels, platform=platform)
        self._interpreted = is_interpreted(self.kernels, platform=platform)
        # Tiles on a TPU span the last two axes: from a projection of more, each program would first
        # make a copy of two axes for its matrix unit, most of the weights again.
        self._flat = platform == "tpu"
        self.state_specs, self.state = self._abstract_state()
        self._graphdef, self._weights_def = self._abstract_share()
        self.weights = self._abstract_weights()

    def _abstract_share(self) -> tuple[nnx.GraphDef, Any]:
        """One device's decoder: how it is put together, from a list of which weights."""
        axis = TP if self.mesh.size > 1 else None
        graphdef, state = nnx.split(self._decoder(share_of(self.config, self.mesh.size), axis))
        return graphdef, jax.tree.structure(state)

    def _abstract_weights(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes of all weights, on all devices together, in the order of the decoder's."""
        decoder = self._decoder(self.config)
        params = nnx.to_pure_dict(nnx.state(decoder))
        shapes = jax.tree.map(_shape, params, param_shardings(self.mesh, params))
        weights = self._in_order(shapes)
        return [_flat_shape(weight) for weight in weights] if self._flat else weights

    def _in_order(self, params: Any) -> list[Any]:
        _, state = nnx.split(self._decoder(self.config))
        nnx.replace_by_pure_dict(state, params)
        return jax.tree.leaves(state)

    def _decoder(self, config: ModelConfig, axis: str | None = None) -> Decoder:
        return nnx.eval_shape(lambda: Decoder(config, init=Init(self.dtype), axis=axis))

    def _abstract_state(self) -> tuple[DeviceState, DeviceState]:
        state = jax.eval_shape(self._zeros)
        specs = jax.tree.map(lambda _: _EVERYWHERE, state)
        specs = specs._replace(pages=jax.tree.map(lambda _: _PAGES, state.pages))
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        return specs, jax.tree.map(_shape, state, shardings)

    def _zeros(self) -> DeviceState:
        config, slots = self.config, self.shape.max_rows
        dense = (slots, config.vocab_size)
        return DeviceState(
            pages=init_layer(
                config,
                self.num_pages * config.num_layers,
                page_size=self.page_size,
                kernels=self.kernels,
                kv_dtype=self.kv_dtype,
            ),
            last_token_R=jnp.zeros(slots, jnp.int32),
            length_R=jnp.ones(slots, jnp.int32),
            done_R=jnp.zeros(slots, bool),
            counts_RV=jnp.zeros(dense, jnp.int32),
            bias_RV=jnp.zeros(dense, jnp.float32),
        )

    def make_state(self) -> DeviceState:
        """The state before the first slice, on the devices."""
        return jax.jit(self._zeros, out_shardings=jax.tree.map(_sharding, self.state))()

    def take_weights(self, params: Any) -> list[jax.Array]:
        """A nested dict of the model's weights as the list that slice programs take.

        They are spread over the mesh if they are not yet. On a TPU the fused projections among
        `params` are used up.
        """
        weights = self._in_order(spread(self.mesh, self.config, params))
        return [flatten_projection(weight) for weight in weights] if self._flat else weights

    def all(self) -> list[Program]:
        """Every program, the largest first."""
        slices = [self._slice(bucket) for bucket in reversed(self.buckets)]
        return [*slices, self._page_copies(), self._extras()]

    def compile_all(
        self,
        progress: Progress,
        *,
        threads: int,
        compile: Callable[[Program], _Made] = Program.compile,
    ) -> dict[Hashable, _Made]:
        """What `compile` makes of every program, by key, `threads` of them at a time.

        Tracing is serial, compiling is not.
        """
        programs, made = self.all(), {}
        started_s = time.monotonic()
        with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
            futures = {pool.submit(compile, program): program for program in programs}
            try:
                for future in as_completed(futures):
                    program = futures[future]
                    made[program.key] = future.result()
                    seconds = time.monotonic() - started_s
                    done = f"{len(made)}/{len(programs)}"
                    progress(f"compiled {done} ({program.name}) after {seconds:.1f} s")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return made

    def _slice(self, bucket: Bucket) -> Program:
        slice_program = SliceProgram(
            decoder_def=self._graphdef,
            treedef=self._weights_def,
            bucket=bucket,
            shape=self.shape,
            eos_token_ids=self.config.eos_token_ids,
            num_layers=self.config.num_layers,
            window=self.config.sliding_window,
            # What is slow to compile is compiled once: native kernels, interpreted ones.
            loop_layers=self.kernels == CPU or self._interpreted,
            kernels=self.kernels,
        )
        weight_specs = [_sharding(weight).spec for weight in self.weights]
        prompts = f" + {bucket.tiles * self.shape.tile} prompt tokens" * bool(bucket.tiles)
        return Program(
            bucket,
            f"{bucket.rows} rows{prompts}",
            self._on_all(
                slice_program.__call__,
                (weight_specs, self.state_specs, _EVERYWHERE),
                (self.state_specs, SliceOutput(*[_EVERYWHERE] * len(SliceOutput._fields))),
            ),
            (self.weights, self.state, self._host_array(self.shape.size(bucket))),
            donated=1,
        )

    def _page_copies(self) -> Program:
        ids = self._host_array(self.shape.max_rows * self.config.num_layers)
        specs = (self.state_specs, _EVERYWHERE, _EVERYWHERE)
        copy = self._on_all(_copy_pages, specs, self.state_specs)
        return Program(PAGE_COPIES, PAGE_COPIES, copy, (self.state, ids, ids), donated=0)

    def _extras(self) -> Program:
        vocab = self.config.vocab_size
        hosts = (
            self._host_array(),
            self._host_array(vocab),
            self._host_array(vocab, dtype=jnp.float32),
        )
        specs = (self.state_specs, *[_EVERYWHERE] * 3)
        extras = self._on_all(_set_extras, specs, self.state_specs)
        return Program(EXTRAS, EXTRAS, extras, (self.state, *hosts), donated=0)

    def _on_all(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`function` as one program of all devices, each of which sees its own shards."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            # What the specs call equal everywhere is: sums and gathers make it so. The check would
            # need types for it on every loop carry.
            check_vma=False,
        )

    def _host_array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """What the host hands to every device."""
        where = NamedSharding(self.mesh, _EVERYWHERE)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def flatten_projection(weight: Any) -> Any:
    """A fused projection [D, ...] as each device's matrix [D, its outputs], side by side.

    Uses it up; other weights are given back.
    """
    if _flat_shape(weight) is weight:
        return weight
    made = _flatten(weight.sharding.mesh, weight.sharding.spec)(weight)
    weight.delete()
    return made


@cache
def _flatten(mesh: Mesh, spec: PartitionSpec) -> Any:
    def flatten(weight: jax.Array) -> jax.Array:
        return weight.reshape(weight.shape[0], -1)

    return jax.jit(jax.shard_map(flatten, mesh=mesh, in_specs=spec, out_specs=_SIDE_BY_SIDE))


def _flat_shape(weight: Any) -> Any:
    """The shape that a fused projection gets; every other weight itself."""
    if weight.ndim < 3 or weight.sharding.spec[0] is not None:
        return weight
    width, *outputs = weight.shape
    where = NamedSharding(weight.sharding.mesh, _SIDE_BY_SIDE)
    return jax.ShapeDtypeStruct((width, math.prod(outputs)), weight.dtype, sharding=where)


def _shape(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _sharding(leaf: jax.ShapeDtypeStruct) -> Any:
    return leaf.sharding


def _copy_pages(state: DeviceState, source_N: jax.Array, target_N: jax.Array) -> DeviceState:
    return state._replace(pages=copy_pages(state.pages, source_N, target_N))


def _set_extras(
    state: DeviceState, slot: jax.Array, counts_V: jax.Array, bias_V: jax.Array
) -> DeviceState:
    return state._replace(
        counts_RV=state.counts_RV.at[slot].set(counts_V),
        bias_RV=state.bias_RV.at[slot].set(bias_V),
    )
