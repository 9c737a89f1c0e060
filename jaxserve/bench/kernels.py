"""How fast paged attention is on this device, beside what the device can do.

Measures the copy bandwidth and the bf16 matrix rate, then decode and prefill through our kernels,
and decode through the kernels that come with JAX and those of other libraries. A kernel's output is
compared with attention in float32 before its time counts. Knows shapes, not models. Our kernels are
the TPU's on a TPU, and the GPU's elsewhere.

Dimension key: B query blocks  Q queries per block  H query heads  K kv heads  C channels per head
N pages  S slots per page  P pages per row
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.bench.kernel_check import INTERPRETED, worst_error
from jaxserve.bench.peers import run
from jaxserve.bench.peers.decode_shapes import LARGEST_ERROR, Sizes, page_tables, read_bytes
from jaxserve.bench.peers.protocol import KernelResult, first_line
from jaxserve.kernels import paged_attention_gpu, paged_attention_tpu
from jaxserve.kernels.block_sizes import GpuBlocks, TpuBlocks
from jaxserve.kernels.kv_pages import RowPages, init_row_pages
from jaxserve.kernels.paged_attention import paged_attention_reference

OURS: Final = "jaxserve"
CALLS: Final = 16  # in one program
_TURNS: Final = 5  # of which the fastest counts
_LANES: Final = 128  # of a TPU, which rows of pages fill


class Rates(NamedTuple):
    """What the device does when nothing is in the way."""

    copy_bytes_per_s: float  # bytes read and bytes written, both counted
    matrix_flops_per_s: float  # of a square bf16 product of random numbers


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; without seconds, `note` says why."""

    kernel: str
    shape: str
    seconds: float | None = None
    error: float | None = None  # the largest of a row over its largest number
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
    """Time a copy that adds one and a square product, many in one program.

    The copy gives its array back: one that is not its own would be copied once more.
    """
    add = jax.jit(lambda x: lax.fori_loop(0, CALLS, lambda _, x: x + 1, x), donate_argnums=0)
    held = [jnp.zeros(sizes.copy_bytes // 4, jnp.float32)]
    num_bytes = held[0].nbytes

    def copy() -> jax.Array:
        held[0] = add(held[0])
        return held[0]

    copy_s = seconds_per_call(copy, sizes.budget_s)
    held.clear()
    n = sizes.matrix
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    b = b * n**-0.5  # a product of products stays in range
    product = jax.jit(lambda a, b: lax.fori_loop(0, CALLS, lambda _, a: a @ b, a))
    product_s = seconds_per_call(lambda: product(a, b), sizes.budget_s)
    return Rates(2 * num_bytes / copy_s, 2 * n**3 / product_s)


class Decode(NamedTuple):
    """One decode step's operands, and the bytes that it must read."""

    q_BQHC: jax.Array
    pages: RowPages
    table_BP: jax.Array
    len_B: jax.Array
    read_bytes: int


def decode_operands(sizes: Sizes, lengths: Sequence[int], dtype=jnp.bfloat16) -> Decode:
    """Random rows of these lengths, their pages scattered over a pool that holds no other."""
    S, len_B = sizes.page_size, np.array(lengths)
    table_BP, num_pages = page_tables(lengths, S)
    like = jax.eval_shape(
        partial(
            init_row_pages,
            num_pages,
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
    return Decode(
        q_BQHC,
        RowPages(pages, scale_NKZ),
        jnp.asarray(table_BP),
        jnp.asarray(len_B, jnp.int32),
        read_bytes(sizes, lengths, jnp.dtype(dtype).itemsize),
    )


class Kernel(NamedTuple):
    """attend(*operands) -> what is like the first of them, which are the queries."""

    attend: Callable[..., Any]
    operands: tuple[Any, ...]


def _ours(decode: Decode, blocks: GpuBlocks | TpuBlocks | None = None) -> Kernel:
    attend = _attend(blocks, decode.pages, decode.len_B.size)
    return Kernel(
        lambda q_BQHC, pages, table_BP, len_B: attend(q_BQHC, pages, table_BP, len_B, len_B - 1),
        decode[:4],
    )


def in_tree(decode: Decode) -> Kernel:
    """JAX's own GPU kernel (Pallas, Triton), over the same keys in the layout that it wants."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    kv_KNSD = decode.pages.kv_NKSD.transpose(1, 0, 2, 3)
    k_KNSC, v_KNSC = jnp.split(kv_KNSD, 2, axis=3)
    q_BHC = decode.q_BQHC[:, 0] * decode.q_BQHC.shape[-1] ** -0.5
    operands = (q_BHC, k_KNSC, v_KNSC, decode.table_BP, decode.len_B)
    return Kernel(partial(paged_attention, interpret=on_cpu()), operands)


def cudnn(decode: Decode) -> Kernel:
    """cuDNN's paged attention, which JAX calls but offers no public name for.

    It wants a pool of as many pages as the tables have entries.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    kv_NKSD, table_BP = decode.pages.kv_NKSD, decode.table_BP
    C = decode.q_BQHC.shape[-1]
    kv_NKSD = jnp.pad(kv_NKSD, ((0, table_BP.size - len(kv_NKSD)), (0, 0), (0, 0), (0, 0)))

    def attend(q_BHQC, k_NKSC, v_NKSC, table_BP, len_B):
        tables = table_BP[:, None, :, None]
        return fused.paged_attention(
            q_BHQC,
            k_NKSC,
            v_NKSC,
            jnp.ones_like(len_B),
            len_B,
            tables,
            tables,
            scale=C**-0.5,
            mask_type=fused.MaskType.PADDING,
            qkv_layout="BNTH",
        )

    q_BHQC = decode.q_BQHC.transpose(0, 2, 1, 3)
    return Kernel(attend, (q_BHQC, kv_NKSD[..., :C], kv_NKSD[..., C:], table_BP, decode.len_B))


def loop_of(kernel: Kernel) -> Any:
    """`CALLS` calls as one jitted function of the operands; each output is the next one's
    queries."""

    @jax.jit
    def loop(first, *rest):
        return lax.fori_loop(0, CALLS, lambda _, q: kernel.attend(q, *rest), first)

    return loop


def time_decode(
    decode: Decode, *, budget_s: float, blocks: GpuBlocks | TpuBlocks | None = None
) -> float:
    """Seconds of one call of our kernel."""
    kernel = _ours(decode, blocks)
    loop = loop_of(kernel)
    return seconds_per_call(lambda: loop(*kernel.operands), budget_s)


@jax.jit
def exact(q_BQHC: jax.Array, pages: RowPages, table_BP: jax.Array, len_B: jax.Array) -> jax.Array:
    """Attention of one decode step in float32, row by row."""

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        q_QHC, table_P, length = row
        rows = (table_P[None], length[None], length[None] - 1)
        return paged_attention_reference(q_QHC[None].astype(jnp.float32), pages, *rows)[0]

    return lax.map(one, (q_BQHC, table_BP, len_B))


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


# What JAX brings along, by the name in the report. A kernel that fails may take the device's
# context with it: ours come before.
_RIVALS: Final[dict[str, Callable[[Decode], Kernel]]] = {"jax": in_tree, "cudnn": cudnn}


def measure(sizes: Sizes, rates: Rates) -> Iterator[Row]:
    """Our kernels and JAX's on every shape; one that fails has a row that says so."""
    for name, lengths in sizes.decode:
        yield from decode_rows(sizes, name, lengths, {OURS: _ours}, rates)
    yield _prefill_row(sizes, rates)
    for name, lengths in sizes.decode:
        rivals = dict(_RIVALS)
        if on_cpu():
            del rivals["cudnn"]
            yield Row("cudnn", f"decode {name}", note="needs a GPU")
        yield from decode_rows(sizes, name, lengths, rivals, rates)


def measure_libraries(python: str, sizes: Sizes, rates: Rates, *, tiny: bool) -> Iterator[Row]:
    """The kernels of torch's libraries, run by `python`; they see shapes and tables, not numbers,
    that are the same. Raises `run.PeerFailed` where that process dies."""
    if run.missing_modules(python, ["torch"]):
        yield Row("torch", "", note=f"not installed for {python}")
        return
    arguments = [f"--sizes={'tiny' if tiny else 'full'}"]
    for result in run.run_module(python, "attention_kernels", arguments):
        if isinstance(result, KernelResult):
            yield _library_row(result, sizes, rates)


def _library_row(result: KernelResult, sizes: Sizes, rates: Rates) -> Row:
    shape = f"decode {result.shape}" if result.shape else ""
    row = Row(result.peer, shape, error=result.error, note=result.note)
    if result.seconds is None:
        return row
    return _with_rate(
        row, result.seconds, read_bytes(sizes, dict(sizes.decode)[result.shape]), rates
    )


def _with_rate(row: Row, seconds: float, num_bytes: int, rates: Rates) -> Row:
    rate = num_bytes / seconds
    share = rate / rates.copy_bytes_per_s
    return replace(row, seconds=seconds, bytes_per_s=rate, copy_share=share)


def _prefill_row(sizes: Sizes, rates: Rates) -> Row:
    shape = f"prefill {sizes.prefill}"
    try:
        seconds, flops = time_prefill(sizes)
    except Exception as error:
        return Row(OURS, shape, note=first_line(error))
    rate = flops / seconds
    share = rate / rates.matrix_flops_per_s
    return Row(OURS, shape, seconds, flops_per_s=rate, matrix_share=share)


def decode_rows(
    sizes: Sizes,
    name: str,
    lengths: Sequence[int],
    kernels: dict[str, Callable[[Decode], Kernel]],
    rates: Rates,
) -> Iterator[Row]:
    """A row for each kernel on one shape: compiled side by side, timed in turn, and only where
    what it returns is right."""
    decode = decode_operands(sizes, lengths)
    with ThreadPoolExecutor(max(1, len(kernels))) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX's own kernel is to be moved
        made = {kernel: pool.submit(_compile, make, decode) for kernel, make in kernels.items()}
        want_BQHC = np.asarray(exact(*decode[:4]))
        for kernel, compiled in made.items():
            row = Row(kernel, f"decode {name}")
            try:
                row = _decode_row(row, compiled, want_BQHC, decode, sizes, rates)
            except Exception as error:  # kernels have limits of their own; the report names them
                row = replace(row, note=first_line(error))
            yield row


_Compiled = tuple[Kernel, Any, Any]


def _compile(make: Callable[[Decode], Kernel], decode: Decode) -> _Compiled:
    """A kernel, one call of it and `CALLS` of them as compiled programs."""
    kernel, options = make(decode), INTERPRETED if on_cpu() else None
    once, loop = (
        function.lower(*kernel.operands).compile(options)
        for function in (jax.jit(kernel.attend), loop_of(kernel))
    )
    return kernel, once, loop


def _decode_row(
    row: Row,
    compiled: "Future[_Compiled]",
    want_BQHC: np.ndarray,
    decode: Decode,
    sizes: Sizes,
    rates: Rates,
) -> Row:
    kernel, once, loop = compiled.result()
    got = np.asarray(once(*kernel.operands), np.float32)
    error = worst_error(got.reshape(want_BQHC.shape), want_BQHC)
    row = replace(row, error=error)
    if not error <= LARGEST_ERROR:
        return replace(row, note=f"wrong: off by {error:.1e}, so its time does not count")
    seconds = seconds_per_call(lambda: loop(*kernel.operands), sizes.budget_s)
    return _with_rate(row, seconds, decode.read_bytes, rates)


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
