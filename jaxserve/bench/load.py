"""How fast a model is loaded, and in how much memory: a random Hugging Face directory, timed.

Every loading runs in a process of its own, from a warm page cache, beside a plain read of the same
bytes. Linux: peaks of resident memory come from /proc.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxserve.bench.peers.weights import hf_fields
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_layout import hf_shapes
from jaxserve.models.random_weights import hf_tensor

FILE_BYTES: Final = 400_000_000
"""A file of the checkpoint takes tensors until it holds this much."""

_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Loading:
    """One loading. Bytes of the checkpoint over `seconds` is its rate.

    `beyond_bytes` is the most memory that was resident at a time, less what the process had before
    and what the weights take.
    """

    dtype: str
    checkpoint_bytes: int
    largest_bytes: int
    weight_bytes: int
    seconds: float
    raw_seconds: float
    touch_seconds: float
    beyond_bytes: int

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.checkpoint_bytes / self.seconds

    @property
    def raw_rate(self) -> float:
        """Bytes per second of a plain read, in the same process just before."""
        return self.checkpoint_bytes / self.raw_seconds

    @property
    def touch_rate(self) -> float:
        """Bytes of weights per second that fresh memory of their size took to be written once.

        A virtual machine may have to be given the memory first. It is given back for the loading.
        """
        return self.weight_bytes / self.touch_seconds


def write_checkpoint(directory: Path, config: ModelConfig, *, seed: int = 0) -> None:
    """Write the weights of `random:` in bfloat16 as Hugging Face does, a file's worth at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = hf_fields(config, dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    place: dict[str, str] = {}
    for number, shapes in enumerate(_files(hf_shapes(config))):
        file = f"model-{number:05}.safetensors"
        tensors = {
            name: hf_tensor(name, shape, seed=seed).astype(jnp.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        place |= dict.fromkeys(shapes, file)
    index = {"weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file."""
    some: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    for name, shape in shapes.items():
        some[name] = shape
        num_bytes += 2 * math.prod(shape)
        if num_bytes >= FILE_BYTES:
            yield some
            some, num_bytes = {}, 0
    if some:
        yield some


def measure(model: str, dtype: str, *, mesh: str = "tp=1") -> Loading:
    """Load `model`, an `hf:` or `orbax:` one, in a fresh process, its files read once before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_here, model, dtype, mesh).result()


def _measure_here(model: str, dtype: str, mesh: str) -> Loading:
    import jax

    from jaxserve.engine.devices import open_mesh
    from jaxserve.models import checkpoint  # noqa: F401 - its import is no part of loading
    from jaxserve.models.sources import load_model_config, load_weights, parse_source

    source = parse_source(model)
    config = load_model_config(source)
    devices = open_mesh(mesh, config)
    jax.block_until_ready(jax.numpy.zeros(1))
    files = [path for path in source.directory.rglob("*") if path.is_file()]
    checkpoint_bytes = sum(path.stat().st_size for path in files)
    _read_all(files)  # warms the page cache
    raw_seconds = min(_seconds(lambda: _read_all(files)) for _ in range(2))
    itemsize = np.dtype(dtype).itemsize
    touch_seconds = _seconds(lambda: np.empty(config.num_parameters * itemsize, np.uint8).fill(1))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    began_s = time.perf_counter()
    weights = load_weights(source, config, dtype=dtype, seed=0, mesh=devices)
    jax.block_until_ready(weights)
    seconds = time.perf_counter() - began_s
    peak = _resident("VmHWM")
    leaves = jax.tree.leaves(weights)
    weight_bytes = sum(leaf.nbytes for leaf in leaves)
    return Loading(
        dtype=dtype,
        checkpoint_bytes=checkpoint_bytes,
        largest_bytes=2 * max(leaf.size for leaf in leaves),
        weight_bytes=weight_bytes,
        seconds=seconds,
        raw_seconds=raw_seconds,
        touch_seconds=touch_seconds,
        beyond_bytes=peak - before - weight_bytes,
    )


def _seconds(work: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _read_all(files: list[Path]) -> None:
    """Read every byte once, on all cores, into memory that is used again."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_read, files))


def _read(path: Path) -> None:
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _resident(field: str) -> int:
    """Bytes, from a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise AssertionError(field)
