"""What is written is read back, and other slots stay as they are: for every way to write."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.kernels.kv_pages import KvPages, init_pages, init_row_pages, read_pages
from jaxserve.kernels.kv_write import implementation, write_kv
from jaxserve.kernels.quant import dequantise, is_quantised, quantise

N, K, C, S = 5, 2, 16, 8
TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
HOPPER = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
WAYS = [
    ("cpu", "float32"),
    *((b, d) for b in ("xla", "pallas_gpu") for d in ("float32", "int8", "float8_e4m3fn")),
    ("pallas_tpu", "float32"),
    ("pallas_tpu", "int8"),
]


@cache
def writer(backend: str):
    return jax.jit(partial(write_kv, backend=backend))


@cache
def filled(backend: str, dtype: str, *, num_pages=N, page_size=S, head_dim=C, seed=1):
    """Pages in which every slot holds something."""
    init = init_pages if backend == "cpu" else init_row_pages
    pages = init(num_pages, page_size=page_size, kv_heads=K, head_dim=head_dim, dtype=dtype)
    at_T = jnp.arange(num_pages * page_size)
    new = random_tokens(at_T.size, head_dim=head_dim, seed=seed)
    return writer("xla")(pages, *new, at_T // page_size, at_T % page_size)


def random_tokens(num: int, *, head_dim=C, seed=2):
    rng = np.random.default_rng(seed)
    shape = (2, num, K, head_dim)
    return tuple(jnp.asarray(x, jnp.float32) for x in rng.standard_normal(shape))


def as_stored(x_TKC, pages):
    dtype = pages.v_NKSC.dtype if isinstance(pages, KvPages) else pages.kv_NKSD.dtype
    if is_quantised(dtype):
        return dequantise(*jax.jit(quantise, static_argnums=1)(x_TKC, dtype))
    return x_TKC.astype(dtype).astype(jnp.float32)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim"), [*((*way, C) for way in WAYS), ("pallas_gpu", "int8", 24)]
)
def test_what_is_written_is_read_back_and_the_rest_stays(backend, dtype, head_dim):
    pages = filled(backend, dtype, head_dim=head_dim)
    k_TKC, v_TKC = random_tokens(4, head_dim=head_dim)
    page_T, slot_T = jnp.array([2, 2, 0, 4]), jnp.array([6, 7, 0, 7])
    write = writer(backend)
    before, after = (
        read_pages(p, jnp.arange(N), head_dim=head_dim)
        for p in (pages, write(pages, k_TKC, v_TKC, page_T, slot_T))
    )
    for old_NSKC, new_NSKC, x_TKC in zip(before, after, (k_TKC, v_TKC), strict=True):
        want_NSKC = old_NSKC.at[page_T, slot_T].set(as_stored(x_TKC, pages))
        np.testing.assert_array_equal(new_NSKC, want_NSKC)


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
def test_a_page_outside_the_pool_drops_the_write(backend, dtype):
    pages = filled(backend, dtype)
    page_T = jnp.array([5, 2**31 - 1, -1, -5], jnp.int32)
    write = writer(backend)
    after = write(pages, *random_tokens(4), page_T, jnp.arange(4))
    jax.tree.map(np.testing.assert_array_equal, after, pages)


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
def test_a_faulty_token_stays_alone(backend, dtype):
    pages = filled(backend, dtype)
    k_TKC, v_TKC = random_tokens(4)
    write = writer(backend)
    k_MSKC, v_MSKC = read_pages(
        write(pages, k_TKC.at[0, 1, 3].set(jnp.nan), v_TKC, jnp.ones(4, jnp.int32), jnp.arange(4)),
        jnp.arange(N),
        head_dim=C,
    )
    bad_MSK = np.isnan(np.asarray(k_MSKC)).any(axis=-1)
    assert np.argwhere(bad_MSK).tolist() == [[1, 0, 1]]
    assert np.isfinite(v_MSKC).all()


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", "float32"), ("xla", "float32"), ("xla", "int8")]
)
def test_writing_in_a_donated_loop_copies_no_pool(backend, dtype):
    # Not bfloat16 nor fp8: XLA:CPU scatters those in float32, which is no matter of ours.
    pages = filled(backend, dtype, num_pages=256, page_size=16, head_dim=64)

    @partial(jax.jit, donate_argnums=0)
    def run(pages, steps):
        def step(i, pages):
            kv_TKC = jnp.full((4, K, 64), i, jnp.float32)
            at_T = jnp.arange(4) + i, jnp.full(4, i % 16)
            return write_kv(pages, kv_TKC, kv_TKC, *at_T, backend=backend)

        return lax.fori_loop(0, steps, step, pages)

    memory = run.lower(pages, 3).compile().memory_analysis()
    pool_bytes = sum(x.nbytes for x in jax.tree.leaves(pages))
    assert memory.temp_size_in_bytes < pool_bytes / 10
    assert memory.alias_size_in_bytes == pool_bytes


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "float32"), (80, "bfloat16"), (128, "int8"), (256, "float8_e4m3fn")],
)
@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_the_gpu_kernel_lowers_for_cuda_and_aliases_the_pool(head_dim, dtype):
    pages = init_row_pages(N, page_size=S, kv_heads=K, head_dim=head_dim, dtype=dtype)
    new = (x.astype(jnp.bfloat16) for x in random_tokens(3, head_dim=head_dim))
    at_T = jnp.zeros(3, jnp.int32)
    write = jax.jit(partial(write_kv, backend="pallas_gpu"))
    with jax.sharding.use_abstract_mesh(HOPPER):
        exported = export.export(write, platforms=["cuda"], disabled_checks=[TRITON])(
            pages, *new, at_T, at_T
        )
    program = exported.mlir_module()
    assert "triton" in program
    assert program.count("output_operand_alias<") == len(jax.tree.leaves(pages))


def test_each_accelerator_has_a_kernel_for_it_and_no_other_backend():
    assert implementation("pallas_gpu") == "pallas_gpu"
    assert implementation("pallas_tpu") == "pallas_tpu"
    assert {implementation(name) for name in ("cpu", "xla", "reference")} == {"xla"}


def test_kernels_write_no_pages_of_the_cpu():
    pages = filled("cpu", "float32")
    with pytest.raises(ValueError, match="'pallas_gpu' writes RowPages, got KvPages"):
        write_kv(
            pages, *random_tokens(1), jnp.zeros(1, int), jnp.zeros(1, int), backend="pallas_gpu"
        )
