"""The GPU's sampling kernel beside XLA's path on the same device: the same tokens, and how fast.

Knows kinds of rows and vocabularies; sampling_check.py knows which tokens are right. Without a GPU
the kernel is interpreted.

Dimension key: B rows  V vocabulary
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.bench.kernel_check import INTERPRETED
from jaxserve.bench.kernels import CALLS, on_cpu, seconds_per_call
from jaxserve.bench.peers.protocol import first_line
from jaxserve.bench.sampling_check import Filter, row_params, wrong_rows
from jaxserve.kernels import sampling
from jaxserve.kernels.sampling import RowParams

_BOTH: Final = ("pallas_gpu", "xla")
_MOST_TOLD: Final = 3  # rows of a kind that are wrong: more say no more, and are slow to judge


class Kind(NamedTuple):
    """Rows that are sampled alike; `spread` is their logits' standard deviation."""

    filter: Filter
    spread: float


# A nucleus of 0.9 among 128256 tokens is some ten of them, or a hundred thousand: every row of the
# former is narrow, of the latter wide.
_STEEP: Final = 6.0
_FLAT: Final = 0.3
GREEDY: Final = "greedy"
KINDS: Final[dict[str, Kind]] = {  # all others are compared with the first
    GREEDY: Kind((0.0, 0, 1.0, 0.0), _STEEP),
    "temperature": Kind((0.8, 0, 1.0, 0.0), _STEEP),
    "top_k 50": Kind((0.8, 50, 1.0, 0.0), _STEEP),
    "top_p 0.9": Kind((0.8, 0, 0.9, 0.0), _STEEP),
    "min_p 0.05": Kind((0.8, 0, 1.0, 0.05), _STEEP),
    "top_k 1000": Kind((0.8, 1000, 1.0, 0.0), _STEEP),
    "top_p 0.9, flat": Kind((0.8, 0, 0.9, 0.0), _FLAT),
}


class Sizes(NamedTuple):
    """What is checked, the first vocabulary before the others, and timed, that one alone."""

    rows: int
    vocabularies: tuple[int, ...]
    budget_s: float  # per measurement


FULL: Final = Sizes(64, (128_256, 1001, 32_000, 151_936, 262_144), 0.2)
TINY: Final = Sizes(8, (777, 65), 0.01)


class Case(NamedTuple):
    """A kind of row that was checked; `at_boundary` counts draws that rounding decided."""

    vocabulary: int
    kind: str
    wrong: tuple[str, ...]
    at_boundary: int = 0


class Timed(NamedTuple):
    """Seconds of one call for rows that are all of a kind; without, `note` says why."""

    kind: str
    kernel_s: float | None = None
    xla_s: float | None = None
    note: str = ""


class _Rows(NamedTuple):
    """What `sampling.sample` takes."""

    logits_BV: jax.Array
    params: RowParams
    position_B: jax.Array
    active_B: jax.Array


def check(rows: int, vocabularies: Iterable[int]) -> Iterator[Case]:
    """Every kind of row in each vocabulary; all programs are compiled side by side."""
    with ThreadPoolExecutor() as pool:
        programs = {
            V: [pool.submit(_compile, sampling.sample, backend, rows, V) for backend in _BOTH]
            for V in vocabularies
        }
        for V, compiled in programs.items():
            for name, kind in KINDS.items():
                try:
                    case = _case(V, name, _odd_rows(kind, rows, V), *(c.result() for c in compiled))
                except Exception as error:  # the report says what failed, and goes on
                    case = Case(V, name, (first_line(error),))
                yield case


def _case(V: int, kind: str, rows: _Rows, kernel: Any, xla: Any) -> Case:
    got, want = kernel(*rows), xla(*rows)
    u_B = sampling.uniforms(rows.params.seed_B, rows.position_B)
    filters = [KINDS[kind].filter] * u_B.size
    wrong = wrong_rows(rows.logits_BV, filters, np.asarray(rows.active_B), u_B, got, want)
    told = tuple(itertools.islice(wrong, _MOST_TOLD))
    return Case(V, kind, told, 0 if told else int(jnp.sum((got[0] != want[0]) & want[1])))


def measure(rows: int, V: int, kinds: Iterable[str], *, budget_s: float) -> Iterator[Timed]:
    """Kernel and XLA on rows that are all of one kind, kind by kind."""
    with ThreadPoolExecutor() as pool:
        kernel, xla = (pool.submit(_compile, _loop, backend, rows, V) for backend in _BOTH)
        for name in kinds:
            timed, operands = Timed(name), _rows(KINDS[name], rows, V)
            try:
                for measured, loop in (("kernel_s", kernel), ("xla_s", xla)):
                    seconds = seconds_per_call(partial(loop.result(), *operands), budget_s)
                    timed = timed._replace(**{measured: seconds})
            except Exception as error:
                timed = timed._replace(note=first_line(error))
            yield timed


def _loop(
    logits_BV: jax.Array,
    params: RowParams,
    position_B: jax.Array,
    active_B: jax.Array,
    *,
    backend: str,
) -> jax.Array:
    """`CALLS` calls; each token moves its row's logits, so that nothing is hoisted.

    That, the uniforms and the loop's count are three small launches besides the kernel's, the same
    for every kind: what a kind takes over another is the kernel's own.
    """
    row_B = jnp.arange(len(logits_BV))

    def call(i: jax.Array, logits_BV: jax.Array) -> jax.Array:
        token_B, _ = sampling.sample(logits_BV, params, position_B + i, active_B, backend=backend)
        return logits_BV.at[row_B, token_B].add(-1e-3)

    return lax.fori_loop(0, CALLS, call, logits_BV)


def _compile(function: Callable[..., Any], backend: str, rows: int, V: int) -> Any:
    """A jitted function of `_Rows` that was called once: the same program takes all kinds."""
    options = INTERPRETED if on_cpu() else None
    compiled = jax.jit(partial(function, backend=backend), compiler_options=options)
    jax.block_until_ready(compiled(*_rows(KINDS[GREEDY], rows, V)))
    return compiled


def _rows(kind: Kind, rows: int, V: int) -> _Rows:
    """Rows of a kind, with random logits."""
    logits_BV = kind.spread * _normal(rows, V)
    position_B = jnp.arange(rows, dtype=jnp.int32)
    return _Rows(logits_BV, row_params([kind.filter] * rows), position_B, jnp.ones(rows, bool))


def _odd_rows(kind: Kind, rows: int, V: int) -> _Rows:
    """The same, but for six in eight: flatter, with ties, with few tokens left, flatter and with
    ties, with no token left, inactive."""
    plain = _rows(kind, rows, V)
    turn_B = jnp.arange(rows) % 8
    return plain._replace(logits_BV=_odd(plain.logits_BV, turn_B), active_B=turn_B != 6)


@partial(jax.jit, static_argnums=(0, 1))
def _normal(rows: int, V: int) -> jax.Array:
    return jax.random.normal(jax.random.key(V), (rows, V))


@jax.jit
def _odd(x_BV: jax.Array, turn_B: jax.Array) -> jax.Array:
    turn_B1 = turn_B[:, None]
    x_BV = jnp.where((turn_B1 == 1) | (turn_B1 == 4), 0.2 * x_BV, x_BV)
    x_BV = jnp.where((turn_B1 == 2) | (turn_B1 == 4), jnp.round(2 * x_BV) / 2, x_BV)
    few_BV = jax.random.uniform(jax.random.key(0), x_BV.shape) < 0.99
    return jnp.where((turn_B1 == 3) & few_BV | (turn_B1 == 5), -jnp.inf, x_BV)
