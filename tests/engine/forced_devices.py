"""Run by test_tensor_parallel.py in a process with four CPU devices; prints one JSON object."""

import dataclasses
import json

import jax

from jaxserve.bench.equality import Cell, EqualityCheck, Grid
from jaxserve.bench.kernel_check import INTERPRETED
from jaxserve.engine.batch import BatchShape
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.hlo_facts import collectives
from jaxserve.engine.programs import Programs
from jaxserve.models.config import SHAPES
from jaxserve.models.partition import tensor_mesh

TINY = SHAPES["tiny"]
FOUR_HEADS = dataclasses.replace(TINY, name="tiny-4", num_kv_heads=4)
SHAPES[FOUR_HEADS.name] = FOUR_HEADS
LAYERS = 3


def compare(model: str) -> int:
    """Tokens of `model` on four devices that were compared with a full recompute on one."""
    grid = Grid(
        model=f"random:{model}",
        num_prompts=8,
        max_tokens=12,
        steps=(4,),
        rows=(8,),
        longest_prompt=60,
        tiles=4,
    )
    check = EqualityCheck(grid, mesh="tp=4", options=INTERPRETED)
    cells = [Cell(4, 8, prefix_hit=hit, preempted=hit, chunked=hit) for hit in (False, True)]
    return sum(check.run(cell) for cell in cells)


def count_collectives() -> dict[str, dict[str, int]]:
    """Those of a decode program and of a mixed one, with the layers unrolled.

    The options change the code of a device, not what devices send each other.
    """
    programs = Programs(
        dataclasses.replace(FOUR_HEADS, num_layers=LAYERS),
        mesh=tensor_mesh(4),
        shape=BatchShape(tile=32, table_pages=4, step_buffer=4, max_rows=8),
        buckets=(Bucket(8, 0), Bucket(8, 1)),
        num_pages=8,
        page_size=16,
        kernels="xla",
        dtype="float32",
    )
    return {
        program.name: collectives(program.compile(INTERPRETED).as_text())
        for program in programs.all()
        if isinstance(program.key, Bucket)
    }


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "layers": LAYERS,
                "tokens": {model: compare(model) for model in (FOUR_HEADS.name, TINY.name)},
                "collectives": count_collectives(),
            }
        )
    )
