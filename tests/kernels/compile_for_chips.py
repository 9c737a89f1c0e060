"""Compiles what a decoding loop does to pages for TPUs and GPUs that are not there.

Cases as JSON lines in, answers out: in a donated loop, tokens are written and attended to. A case
with a vocabulary is the GPU's sampling instead.

A process of its own, because compilers must be told before JAX loads that no chip is asked for.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.bench.sampling_check import row_params
from jaxserve.engine.compile_ahead import topology_mesh
from jaxserve.engine.gpu_facts import OPTIONS, pallas_kernels
from jaxserve.kernels import sampling
from jaxserve.kernels.kv_pages import init_row_pages
from jaxserve.kernels.kv_write import write_kv
from jaxserve.kernels.paged_attention import paged_attention
from jaxserve.models.topology import parse_topology

POOL_BYTES = 1 << 30  # eight times a TPU's VMEM, so that a copy of the pool cannot hide there
CALLS = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}
LANES = {"tpu": 128, "gpu": 1}


def compile_case(case: dict) -> dict:
    K, C, S, G, Q, B, P = (case[name] for name in ("K", "C", "S", "G", "Q", "B", "P"))
    topology = parse_topology(case["topology"])
    platform, mesh = topology.platform, topology_mesh(f"tp={case['tp']}", topology)
    dtype, backend = jnp.dtype(case["dtype"]), f"pallas_{topology.platform}"
    layout = dict(page_size=S, kv_heads=K, head_dim=C, dtype=dtype, lanes=LANES[platform])
    one_page = jax.eval_shape(lambda: init_row_pages(1, **layout))
    N = POOL_BYTES // (one_page.kv_NKSD.size * dtype.itemsize)
    by_head, whole = PartitionSpec(None, "tp"), PartitionSpec()

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    pages = jax.tree.map(lambda x: array((N, *x.shape[1:]), x.dtype, by_head), one_page)
    wide = jnp.bfloat16 if dtype.itemsize == 1 else dtype
    operands = (
        pages,
        array((B, Q, K * G, C), wide, PartitionSpec(None, None, "tp")),
        array((B, K, C), wide, by_head),
        array((B, P), jnp.int32, whole),
        array((B,), jnp.int32, whole),
        array((), jnp.int32, whole),
    )
    options = {name: case[name] for name in ("window", "soft_cap")} | {"backend": backend}

    def decode(pages, q_BQHC, k_BKC, table_BP, len_B, steps):
        def step(i, carry):
            pages, q_BQHC = carry
            at_B = (table_BP[:, 0], (len_B + i) % S)
            pages = write_kv(pages, k_BKC, k_BKC, *at_B, backend=backend)
            return pages, paged_attention(q_BQHC, pages, table_BP, len_B + i, len_B, **options)

        return lax.fori_loop(0, steps, step, (pages, q_BQHC))

    specs = jax.tree.map(lambda x: x.sharding.spec, operands)
    shard = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(shard, donate_argnums=0).lower(*operands)
        if platform == "tpu":
            compiled, kernels = lowered.compile(), []
        else:
            compiled = lowered.compile({"xla_dump_to": folder, **OPTIONS})
            kernels = [asdict(facts) for facts in pallas_kernels(Path(folder), compiled.as_text())]
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return {
        "calls": compiled.as_text().count(f'custom_call_target="{CALLS[platform]}"'),
        "kernels": kernels,
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes * case["tp"],
        "flops": cost.get("flops", 0) * case["tp"],
        "bytes": cost.get("bytes accessed", 0) * case["tp"],
    }


def compile_sampling(case: dict) -> dict:
    mesh = topology_mesh("tp=1", parse_topology(case["topology"]))
    where = NamedSharding(mesh, PartitionSpec())
    params = row_params([(1.0, 0, 1.0, 0.0)] * case["B"])

    def draw(logits_BV, position_B):
        active_B = position_B > 0
        return sampling.sample(logits_BV, params, position_B, active_B, backend="pallas_gpu")

    operands = (
        jax.ShapeDtypeStruct((case["B"], case["V"]), jnp.float32, sharding=where),
        jax.ShapeDtypeStruct((case["B"],), jnp.int32, sharding=where),
    )
    everywhere = PartitionSpec()
    shard = jax.shard_map(
        draw, mesh=mesh, in_specs=(everywhere,) * 2, out_specs=everywhere, check_vma=False
    )
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        compiled = jax.jit(shard).lower(*operands).compile({"xla_dump_to": folder, **OPTIONS})
        kernels = [asdict(facts) for facts in pallas_kernels(Path(folder), compiled.as_text())]
    return {"kernels": kernels}


def answer(line: str) -> dict:
    case = json.loads(line)
    try:
        return compile_sampling(case) if "V" in case else compile_case(case)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"[:2000]}


# Before there are threads: two that load a compiler at once get in each other's way.
topology_mesh("auto", parse_topology(sys.argv[1]))
with ThreadPoolExecutor(2) as pool:
    for found in pool.map(answer, sys.stdin):
        print(json.dumps(found), flush=True)
