"""Puts the decoder's tensors together from rows of source tensors, in the memory they stay in.

Rows are read, cast and copied, a small piece at a time, into one buffer per distinct shard; on a
CPU the buffer itself becomes the array. So no tensor is held twice there, and elsewhere at most
`_IN_FLIGHT` are held beside the weights. Knows no file format and no tensor by name.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.hf_layout import Path, Piece, ReadRows

_IN_FLIGHT: Final = 2
"""Tensors being filled at a time: the next one keeps the threads busy while one is finished."""
_MOST_THREADS: Final = 8
_PIECES_PER_JOB: Final = 4
_ALIGNMENT: Final = 64
"""Bytes; XLA takes over a host buffer that is aligned so, and copies any other."""


@runtime_checkable
class TensorSource(Protocol):
    """Where rows come from. `splits`: reading some rows of a tensor costs just those rows."""

    splits: bool

    def open(self, name: str) -> ReadRows: ...


@dataclass(frozen=True, slots=True)
class _Shard:
    """The part of a tensor that `devices` hold: `box` of it, and its buffer."""

    box: tuple[slice, ...]
    buffer: np.ndarray
    devices: list[Any]


def assemble(
    plan: Iterable[tuple[Path, list[Piece]]], target: Any, source: TensorSource
) -> Iterator[tuple[Path, jax.Array]]:
    """Path and array of every tensor of `plan`, in its order.

    `target` is the nested dict of `jax.ShapeDtypeStruct`s with shardings that says what each is to
    be. Raises what `source` raises.
    """
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="load")
    filling: deque[tuple[Path, Any, list[_Shard], list[Future[None]]]] = deque()
    try:
        for path, pieces in plan:
            leaf = _at(target, path)
            shards = _shards(leaf)
            jobs = [pool.submit(_fill, source, job, shards) for job in _jobs(source, pieces)]
            filling.append((path, leaf, shards, jobs))
            if len(filling) == _IN_FLIGHT:
                yield _finished(*filling.popleft())
        while filling:
            yield _finished(*filling.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _shards(leaf: jax.ShapeDtypeStruct) -> list[_Shard]:
    """The distinct shards of this process's devices, with buffers to be filled."""
    assert leaf.sharding is not None
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        ends = tuple(at.indices(size)[:2] for at, size in zip(index, leaf.shape, strict=True))
        holders.setdefault(ends, []).append(device)
    return [
        _Shard(
            tuple(slice(start, stop) for start, stop in ends),
            _aligned(tuple(stop - start for start, stop in ends), np.dtype(leaf.dtype)),
            devices,
        )
        for ends, devices in holders.items()
    ]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _jobs(source: TensorSource, pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one source tensor each, all of them unless it can be read in parts."""
    for _, group in groupby(pieces, lambda piece: piece.name):
        some = list(group)
        most = _PIECES_PER_JOB if source.splits else len(some)
        yield from (some[start : start + most] for start in range(0, len(some), most))


def _fill(source: TensorSource, pieces: list[Piece], shards: list[_Shard]) -> None:
    read = source.open(pieces[0].name)
    for piece in pieces:
        parts = [(shard.buffer, *part) for shard in shards if (part := _overlap(piece, shard))]
        if parts:
            rows = _cast(read(piece.start, piece.stop), parts[0][0].dtype)
            rows = _as_integers(rows.T if piece.transposed else rows)
            for buffer, into, taken in parts:
                _as_integers(buffer)[into] = rows[taken]


def _overlap(piece: Piece, shard: _Shard) -> tuple[tuple[Any, ...], tuple[slice, ...]] | None:
    """Where in the shard's buffer a part of the piece goes, and which part; None if none does."""
    into: list[int | slice] = []
    taken: list[slice] = []
    for at, box in zip(piece.into, shard.box, strict=True):
        if isinstance(at, int):
            if not box.start <= at < box.stop:
                return None
            into.append(at - box.start)
            continue
        first = at.start or 0
        start = max(first, box.start)
        stop = box.stop if at.stop is None else min(at.stop, box.stop)
        if start >= stop:
            return None
        into.append(slice(start - box.start, stop - box.start))
        taken.append(slice(start - first, stop - first))
    return tuple(into), tuple(taken)


def _cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if rows.dtype == dtype:
        return rows
    if rows.dtype == jnp.bfloat16 and dtype == np.float32:
        # The upper half of a float32: a shift, which unlike the cast lets other threads run.
        return np.left_shift(rows.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    return rows.astype(dtype)


def _as_integers(array: np.ndarray) -> np.ndarray:
    """The same bits: numpy copies integers fast and lets other threads run, bfloat16 neither."""
    return array.view(f"u{array.dtype.itemsize}")


def _finished(
    path: Path, leaf: Any, shards: list[_Shard], jobs: list[Future[None]]
) -> tuple[Path, jax.Array]:
    for job in jobs:
        job.result()
    parts = [
        jax.device_put(shard.buffer, device, may_alias=True)
        for shard in shards
        for device in shard.devices
    ]
    array = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    return path, jax.block_until_ready(array)  # elsewhere than on a CPU it frees the buffers
