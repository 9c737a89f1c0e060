"""How fast paged attention is on this device, beside what the device can do.

Measures the copy bandwidth and the bf16 matrix rate, then decode and prefill through our kernels,
JAX's own paged attention and library kernels, in one run. Knows shapes, not models. Our kernels are
the TPU's on a TPU, and the GPU's elsewhere.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  C channels per head
N pages  S slots per page  P pages per row
"""

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.bench.peers.attention_kernels import LIBRARIES
from jaxserve.kernels import paged_attention_gpu, paged_attention_tpu
from jaxserve.kernels.block_sizes import GpuBlocks, TpuBlocks
from jaxserve.kernels.kv_pages import RowPages, init_row_pages

CALLS: Final = 16  # in one program
_TURNS: Final = 5  # of which the fastest counts
_LANES: Final = 128  # of a TPU, which rows of pages fill


class Rates(NamedTuple):
    """What the device does when nothing is in the way."""

    copy_bytes_per_s: float  # bytes read and bytes written, both counted
    matrix_flops_per_s: float  # of a square bf16 product of random numbers


class Sizes(NamedTuple):
    """What is measured. `TINY` proves the way on a CPU; its numbers mean nothing."""

    copy_bytes: int
    matrix: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    decode: tuple[tuple[str, tuple[int, ...]], ...]  # name, length of each row
    prefill: int  # tokens of one prompt
    block: int  # queries per block of it
    budget_s: float  # per measurement


def _mixed(rows: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths spread evenly over their logarithm, in random order."""
    lengths = np.geomspace(shortest, longest, rows).astype(int)
    return tuple(np.random.default_rng(0).permutation(lengths).tolist())


FULL: Final = Sizes(
    copy_bytes=2**31,
    matrix=8192,
    heads=32,
    kv_heads=8,
    head_dim=128,
    page_size=64,
    decode=(
        ("64 x 4k", (4096,) * 64),
        ("64 x 128..16k", _mixed(64, 128, 16384)),
        ("64 x 1k", (1024,) * 64),
        ("256 x 1k", (1024,) * 256),
        ("1 x 16k", (16384,)),
    ),
    prefill=8192,
    block=64,
    budget_s=0.5,
)
TINY: Final = Sizes(
    copy_bytes=2**20,
    matrix=64,
    heads=4,
    kv_heads=2,
    head_dim=64,
    page_size=16,
    decode=(("2 x 32", (32, 32)), ("3 x 1..48", (1, 7, 48))),
    prefill=64,
    block=32,
    budget_s=0.01,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; without seconds, `note` says why."""

    kernel: str
    shape: str
    seconds: float | None = None
    bytes_per_s: float | None = None
    copy_share: float | None = None
    flops_per_s: float | None = None
    matrix_share: float | None = None
    note: str = ""


def on_cpu() -> bool:
    """Whether kernels must be interpreted, and sizes small: there is no accelerator."""
    return jax.default_backend() == "cpu"


def _attend(blocks: GpuBlocks | TpuBlocks | None, pages: RowPages, num_blocks: int) -> Any:
    """Our kernel of the device, with `blocks`; of the kind of `blocks`, where they are given."""
    options: dict[str, Any] = dict(window=None, soft_cap=None, scale=None, interpret=on_cpu())
    if isinstance(blocks, TpuBlocks):
        sizes = paged_attention_tpu.sizes_of(blocks, pages, num_blocks)
        return partial(paged_attention_tpu.attend, sizes=sizes, **options)
    if blocks is None and jax.default_backend() == "tpu":
        return partial(paged_attention_tpu.attend, **options)
    return partial(paged_attention_gpu.attend, blocks=blocks, **options)


def seconds_per_call(run: Callable[[], Any], budget_s: float) -> float:
    """The least time of one of the `CALLS` calls that `run` starts; its result can be waited for.

    The calls are a loop of known length in one program: one of unknown length asks the host after
    every turn, which costs more than a short kernel.
    """

    def turn(runs: int) -> float:
        began_s = time.perf_counter()
        for _ in range(runs):
            last = run()
        jax.block_until_ready(last)
        return (time.perf_counter() - began_s) / (runs * CALLS)

    turn(1)
    runs = max(1, int(budget_s / _TURNS / CALLS / turn(1)))
    return min(turn(runs) for _ in range(_TURNS))


def measure_rates(sizes: Sizes) -> Rates:
    """Time a copy that adds one and a square product, many in one program."""
    x = jnp.zeros(sizes.copy_bytes // 4, jnp.float32)
    copy = jax.jit(lambda x: lax.fori_loop(0, CALLS, lambda _, x: x + 1, x))
    copy_s = seconds_per_call(lambda: copy(x), sizes.budget_s)
    n = sizes.matrix
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    b = b * n**-0.5  # a product of products stays in range
    product = jax.jit(lambda a, b: lax.fori_loop(0, CALLS, lambda _, a: a @ b, a))
    product_s = seconds_per_call(lambda: product(a, b), sizes.budget_s)
    return Rates(2 * x.nbytes / copy_s, 2 * n**3 / product_s)


class Decode(NamedTuple):
    """One decode step's operands, and the bytes that it must read."""

    q_BQHC: jax.Array
    pages: RowPages
    table_BP: jax.Array
    len_B: jax.Array
    read_bytes: int


def decode_operands(sizes: Sizes, lengths: Sequence[int], dtype=jnp.bfloat16) -> Decode:
    """Random rows of these lengths, their pages scattered over a pool that holds no other."""
    rng, S = np.random.default_rng(0), sizes.page_size
    len_B = np.array(lengths)
    num_pages_B = -(-len_B // S)
    # Tables as wide as the longest row, in the unit that JAX's own kernel needs.
    table_BP = np.zeros((len(lengths), -(-num_pages_B.max() // 16) * 16), np.int32)
    shuffled = rng.permutation(num_pages_B.sum())
    for row, own in zip(table_BP, np.split(shuffled, np.cumsum(num_pages_B)[:-1]), strict=True):
        row[: len(own)] = own
    like = jax.eval_shape(
        partial(
            init_row_pages,
            len(shuffled),
            page_size=S,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            dtype=dtype,
            lanes=_LANES if jax.default_backend() == "tpu" else 1,
        )
    )
    shape_NKSD = like.kv_NKSD.shape
    pages, q_BQHC = jax.jit(
        lambda key: (
            jax.random.normal(key, shape_NKSD, jnp.bfloat16).astype(dtype),
            jax.random.normal(key, (len(lengths), 1, sizes.heads, sizes.head_dim), jnp.bfloat16),
        )
    )(jax.random.key(1))
    scale_NKZ = None
    if jnp.dtype(dtype).itemsize == 1:
        scale_NKZ = jnp.ones((*shape_NKSD[:2], 2 * S), jnp.float32)
    token_bytes = 2 * sizes.kv_heads * (sizes.head_dim * pages.dtype.itemsize)
    token_bytes += 0 if scale_NKZ is None else 8 * sizes.kv_heads
    return Decode(
        q_BQHC,
        RowPages(pages, scale_NKZ),
        jnp.asarray(table_BP),
        jnp.asarray(len_B, jnp.int32),
        int(len_B.sum()) * token_bytes,
    )


def time_decode(
    decode: Decode, *, budget_s: float, blocks: GpuBlocks | TpuBlocks | None = None
) -> float:
    """Seconds of one call of our kernel, each call's output being the next one's queries."""
    attend = _attend(blocks, decode.pages, decode.len_B.size)

    @jax.jit
    def loop(q_BQHC, pages, table_BP, len_B):
        def call(_, q_BQHC):
            return attend(q_BQHC, pages, table_BP, len_B, len_B - 1)

        return lax.fori_loop(0, CALLS, call, q_BQHC)

    return seconds_per_call(lambda: loop(*decode[:4]), budget_s)


def _time_jax(decode: Decode, budget_s: float) -> float:
    """JAX's own GPU kernel (Pallas, Triton), over the same keys in the layout that it wants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its being moved elsewhere
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    kv_KNSD = decode.pages.kv_NKSD.transpose(1, 0, 2, 3)
    k_KNSC, v_KNSC = jnp.split(kv_KNSD, 2, axis=3)
    q_BHC = decode.q_BQHC[:, 0] * decode.q_BQHC.shape[-1] ** -0.5

    @jax.jit
    def loop(q_BHC, k_KNSC, v_KNSC):
        def call(_, q_BHC):
            rest = (decode.table_BP, decode.len_B)
            return paged_attention(q_BHC, k_KNSC, v_KNSC, *rest, interpret=on_cpu())

        return lax.fori_loop(0, CALLS, call, q_BHC)

    return seconds_per_call(lambda: loop(q_BHC, k_KNSC, v_KNSC), budget_s)


def time_prefill(
    sizes: Sizes, *, blocks: GpuBlocks | TpuBlocks | None = None, dtype=jnp.bfloat16
) -> tuple[float, int]:
    """Seconds of one causal prefill of one prompt through its pages, and its FLOPs."""
    T, Q = sizes.prefill, sizes.block
    decode = decode_operands(sizes, (T,), dtype)
    B = T // Q
    q_BQHC = jnp.tile(decode.q_BQHC, (B, Q, 1, 1))
    table_BP = jnp.tile(decode.table_BP, (B, 1))
    start_B = Q * jnp.arange(B, dtype=jnp.int32)
    attend = _attend(blocks, decode.pages, B)

    @jax.jit
    def loop(q_BQHC, pages, table_BP, start_B):
        def call(_, q_BQHC):
            return attend(q_BQHC, pages, table_BP, jnp.full_like(start_B, T), start_B)

        return lax.fori_loop(0, CALLS, call, q_BQHC)

    operands = (q_BQHC, decode.pages, table_BP, start_B)
    seconds = seconds_per_call(lambda: loop(*operands), sizes.budget_s)
    return seconds, 4 * sizes.head_dim * sizes.heads * (T * (T + 1) // 2)


def measure(sizes: Sizes, rates: Rates) -> Iterator[Row]:
    """Every kernel on every shape; a kernel that is not there or fails has a row that says so."""
    for name, lengths in sizes.decode:
        decode = decode_operands(sizes, lengths)
        rivals: dict[str, Callable[[], float]] = {
            "jaxserve": partial(time_decode, decode, budget_s=sizes.budget_s),
            "jax": partial(_time_jax, decode, sizes.budget_s),
        }
        for library, timer in LIBRARIES.items():
            if importlib.util.find_spec(library) is None:
                yield Row(library, f"decode {name}", note="not installed")
            elif on_cpu():
                yield Row(library, f"decode {name}", note="needs a GPU")
            else:
                rivals[library] = partial(timer, decode, sizes.budget_s)
        for kernel, timer in rivals.items():
            yield _decode_row(kernel, f"decode {name}", timer, decode, rates)
    seconds, flops = time_prefill(sizes)
    rate = flops / seconds
    yield Row(
        "jaxserve",
        f"prefill {sizes.prefill}",
        seconds,
        flops_per_s=rate,
        matrix_share=rate / rates.matrix_flops_per_s,
    )


def _decode_row(
    kernel: str, shape: str, timer: Callable[[], float], decode: Decode, rates: Rates
) -> Row:
    try:
        seconds = timer()
    except Exception as error:  # other kernels have limits of their own; the report names them
        if kernel == "jaxserve":
            raise
        return Row(kernel, shape, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    rate = decode.read_bytes / seconds
    return Row(kernel, shape, seconds, rate, rate / rates.copy_bytes_per_s)


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines for a person."""
    yield f"{'kernel':12s} {'shape':22s} {'us':>9s} {'GB/s':>7s} {'of copy':>8s} {'TFLOP/s':>8s}"
    for row in rows:
        if row.seconds is None:
            yield f"{row.kernel:12s} {row.shape:22s} {row.note}"
            continue
        line = f"{row.kernel:12s} {row.shape:22s} {row.seconds * 1e6:9.1f}"
        if row.bytes_per_s is not None and row.copy_share is not None:
            line += f" {row.bytes_per_s / 1e9:7.0f} {row.copy_share:8.1%}"
        if row.flops_per_s is not None and row.matrix_share is not None:
            line += f" {'':16s} {row.flops_per_s / 1e12:8.1f}, {row.matrix_share:.1%} of a product"
        yield line


def as_json(rates: Rates, rows: Iterable[Row], *, tiny: bool) -> dict[str, Any]:
    """Everything measured, and on what."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "interpreted_at_tiny_sizes": tiny,
        "rates": rates._asdict(),
        "rows": [asdict(row) for row in rows],
    }
