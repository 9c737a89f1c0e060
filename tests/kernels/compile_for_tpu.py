"""Compiles paged attention for TPUs that are not there: cases as JSON lines in, answers out.

A process of its own, because libtpu must be told before it loads that no TPU is asked for.
"""

import json
import os
import sys

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.kernels.kv_pages import RowPages
from jaxserve.kernels.paged_attention_tpu import attend, row_lanes

K = 2


def compile_case(case: dict) -> dict:
    """Sixteen times more pages than fit VMEM, so that a copy of the pool cannot hide there."""
    C, S, G, Q, B, P = (case[name] for name in ("C", "S", "G", "Q", "B", "P"))
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"])
    mesh = Mesh(topology.devices[:1], "x")
    dtype = jnp.dtype(case["dtype"])
    bytes_of_page = K * S * row_lanes(C) * dtype.itemsize
    N = (2 << 30) // bytes_of_page

    def array(shape, dtype):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    narrow = dtype.itemsize == 1
    pages = RowPages(
        array((N, K, S, row_lanes(C)), dtype),
        array((N, K, 2 * S), jnp.float32) if narrow else None,
    )
    operands = (
        array((B, Q, K * G, C), jnp.bfloat16 if narrow else dtype),
        pages,
        array((B, P), jnp.int32),
        array((B,), jnp.int32),
        array((B,), jnp.int32),
    )

    def run(*operands):
        options = {name: case[name] for name in ("window", "soft_cap")}
        return attend(*operands, **options, scale=None)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run).lower(*operands).compile()
    cost = compiled.cost_analysis()
    return {
        "mosaic": "tpu_custom_call" in compiled.as_text(),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
    }


for line in sys.stdin:
    try:
        print(json.dumps(compile_case(json.loads(line))), flush=True)
    except Exception as e:
        print(json.dumps({"error": f"{type(e).__name__}: {e}"[:2000]}), flush=True)
