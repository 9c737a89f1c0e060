"""Finds block sizes for the kernels of the device at hand, and writes them into their table.

One field is varied after another, from the default on, until none is better: fields act nearly
alone, and each try compiles a kernel. Knows `kernels/block_sizes.py` as a module and as text.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from jaxserve.bench.kernels import decode_operands, time_decode, time_prefill
from jaxserve.bench.peers.decode_shapes import Sizes
from jaxserve.kernels import block_sizes
from jaxserve.kernels.block_sizes import (
    GpuBlocks,
    Key,
    TpuBlocks,
    default_gpu_blocks,
    default_tpu_blocks,
)

Blocks = GpuBlocks | TpuBlocks

_DECODE: Final[dict[str, tuple[int, ...]]] = {
    "step_keys": (16, 32, 64, 128),
    "num_stages": (3, 4, 5, 6, 7, 9),
    "num_warps": (2, 4, 8),
    "programs": (132, 264, 396, 528, 1056),
    "piece_keys": (128, 256, 512, 1024),
    "most_pieces": (16, 32, 64),
}
_TILE: Final[dict[str, tuple[int, ...]]] = {
    "rows": (32, 64, 128, 256),
    "step_keys": (16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 7),
}
_TPU: Final[dict[str, tuple[int, ...]]] = {
    "block_bytes": (1 << 18, 1 << 19, 1 << 20, 2 << 20, 4 << 20),
    "ring": (2, 3, 4, 6, 8),
    "cores": (1, 2),
}
_GAIN: Final = 0.99  # less is noise, and stays as it was
_BEGIN, _END = "# tuned rows begin\n", "# tuned rows end\n"


def descend(
    start: Any, choices: Mapping[str, tuple[int, ...]], cost: Callable[[Any], float]
) -> tuple[Any, float]:
    """The record of least cost that changing one field at a time leads to, and its cost.

    `cost` may raise for sizes that do not compile or do not fit: they cost infinitely much.
    """
    best, least = start, cost(start)
    improved = True
    while improved:
        improved = False
        for field, values in choices.items():
            for value in values:
                tried = best._replace(**{field: value})
                if tried == best:
                    continue
                try:
                    seconds = cost(tried)
                except Exception:  # too many registers, too much shared memory, sizes that clash
                    continue
                if seconds < _GAIN * least:
                    best, least, improved = tried, seconds, True
    return best, least


def tune(
    platform: str,
    device_kind: str,
    sizes: Sizes,
    dtype: str,
    *,
    say: Callable[[str], None],
    quick: bool,
) -> Blocks:
    """Block sizes for these heads and pages on `platform`, "tpu" or any other for the GPU's.

    `quick` tries one value per kernel, which proves the way.
    """
    one = _tune_tpu if platform == "tpu" else _tune_gpu
    return one(device_kind, sizes, dtype, say=say, quick=quick)


def _tune_tpu(
    device_kind: str, sizes: Sizes, dtype: str, *, say: Callable[[str], None], quick: bool
) -> TpuBlocks:
    """Least time summed over the decode shapes and the prefill: one kernel does both."""
    batches = [decode_operands(sizes, lengths, dtype) for _, lengths in sizes.decode]

    def seconds(blocks: TpuBlocks) -> float:
        total = sum(time_decode(x, budget_s=sizes.budget_s, blocks=blocks) for x in batches)
        total += time_prefill(sizes, blocks=blocks, dtype=dtype)[0]
        say(f"{total * 1e6:9.1f} us  {blocks}")
        return total

    return descend(default_tpu_blocks(device_kind), {"ring": (2,)} if quick else _TPU, seconds)[0]


def _tune_gpu(
    device_kind: str, sizes: Sizes, dtype: str, *, say: Callable[[str], None], quick: bool
) -> GpuBlocks:
    """Least time summed over the decode shapes, and least time of the prefill."""
    default = default_gpu_blocks(device_kind, sizes.head_dim, dtype)
    batches = [decode_operands(sizes, lengths, dtype) for _, lengths in sizes.decode]

    def decode_s(decode) -> float:
        if decode.piece_keys % decode.step_keys:
            raise ValueError(f"piece_keys: got {decode.piece_keys}; allowed: whole steps")
        blocks = GpuBlocks(decode, default.tile)
        seconds = sum(time_decode(x, budget_s=sizes.budget_s, blocks=blocks) for x in batches)
        say(f"{seconds * 1e6:9.1f} us  {decode}")
        return seconds

    def tile_s(tile) -> float:
        blocks = GpuBlocks(default.decode, tile)
        seconds, _ = time_prefill(sizes, blocks=blocks, dtype=dtype)
        say(f"{seconds * 1e6:9.1f} us  {tile}")
        return seconds

    few = {"step_keys": (16,)}
    decode, _ = descend(default.decode, few if quick else _DECODE, decode_s)
    tile, _ = descend(default.tile, few if quick else _TILE, tile_s)
    return GpuBlocks(decode, tile)


def write_rows(rows: Mapping[Key, Blocks], path: str | Path = block_sizes.__file__) -> None:
    """Add rows to their tables in the file, replacing those of the same key; kept sorted."""
    path = Path(path)
    text = path.read_text()
    head, rest = text.split(_BEGIN)
    _, tail = rest.split(_END)
    tables: dict[str, tuple[Mapping[Key, Any], type]] = {
        "GPU": (block_sizes.GPU, GpuBlocks),
        "TPU": (block_sizes.TPU, TpuBlocks),
    }
    text = [head, _BEGIN]
    for name, (table, kind) in tables.items():
        own = {key: blocks for key, blocks in rows.items() if isinstance(blocks, kind)}
        text += _lines(name, kind.__name__, {**table, **own})
    path.write_text("".join([*text, _END, tail]))


def _lines(name: str, kind: str, rows: Mapping[Key, Any]) -> Iterator[str]:
    """A table as the formatter would write it."""
    declared = f"{name}: Final[dict[Key, {kind}]] = {{"
    if not rows:
        yield f"{declared}}}\n"
        return
    yield f"{declared}\n"
    for (device, *numbers, dtype), blocks in sorted(rows.items()):
        key = ", ".join([f'"{device}"', *map(str, numbers), f'"{dtype}"'])
        if isinstance(blocks, TpuBlocks):
            yield f"    ({key}): TpuBlocks({', '.join(map(str, blocks))}),\n"
            continue
        yield f"    ({key}): GpuBlocks(\n"
        for record in blocks:
            values = ", ".join(map(str, record))
            yield f"        {type(record).__name__}({values}),\n"
        yield "    ),\n"
    yield "}\n"
