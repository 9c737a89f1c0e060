"""Compiles what a decoding loop does to pages for TPUs that are not there.

Cases as JSON lines in, answers out: in a donated loop, tokens are written and attended to.

A process of its own, because libtpu must be told before it loads that no TPU is asked for.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.kernels.kv_pages import RowPages
from jaxserve.kernels.kv_write_tpu import write
from jaxserve.kernels.paged_attention_tpu import attend, row_lanes

POOL_BYTES = 2 << 30  # sixteen times VMEM, so that a copy of the pool cannot hide there


def compile_case(case: dict) -> dict:
    K, C, S, G, Q, B, P = (case[name] for name in ("K", "C", "S", "G", "Q", "B", "P"))
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"])
    mesh = Mesh(topology.devices[: case["tp"]], "tp")
    dtype, D = jnp.dtype(case["dtype"]), row_lanes(C)
    narrow = dtype.itemsize == 1
    N = POOL_BYTES // (K * S * D * dtype.itemsize)
    by_head, whole = PartitionSpec(None, "tp"), PartitionSpec()

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    pages = RowPages(
        array((N, K, S, D), dtype, by_head),
        array((N, K, 2 * S), jnp.float32, by_head) if narrow else None,
    )
    operands = (
        pages,
        array((B, Q, K * G, C), jnp.bfloat16 if narrow else dtype, PartitionSpec(None, None, "tp")),
        array((B, K, D), dtype, by_head),
        array((B, K, 2), jnp.float32, by_head) if narrow else None,
        array((B, P), jnp.int32, whole),
        array((B,), jnp.int32, whole),
        array((), jnp.int32, whole),
    )
    options = {name: case[name] for name in ("window", "soft_cap")}

    def decode(pages, q_BQHC, row_BKD, scale_BK2, table_BP, len_B, steps):
        def step(i, carry):
            pages, q_BQHC = carry
            pages = write(pages, row_BKD, scale_BK2, table_BP[:, 0], (len_B + i) % S)
            out = attend(q_BQHC, pages, table_BP, len_B + i, len_B, **options, scale=None)
            return pages, out

        return lax.fori_loop(0, steps, step, (pages, q_BQHC))

    specs = jax.tree.map(lambda x: x.sharding.spec, operands)
    shard = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
    with jax.set_mesh(mesh):
        compiled = jax.jit(shard, donate_argnums=0).lower(*operands).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes * case["tp"],
        "flops": cost["flops"] * case["tp"],
        "bytes": cost["bytes accessed"] * case["tp"],
    }


def answer(line: str) -> dict:
    try:
        return compile_case(json.loads(line))
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"[:2000]}


# Before there are threads: two that load libtpu at once get in each other's way.
topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
with ThreadPoolExecutor(2) as pool:
    for found in pool.map(answer, sys.stdin):
        print(json.dumps(found), flush=True)
