"""Draw every row's next token on a GPU, in one launch: a Pallas kernel, lowered through Triton.

Knows logits and per-row numbers; `sampling` says what they mean. What a filter keeps and where a
draw ends is `thresholds`' code, run here on one row. Interpreted, the kernel runs on a CPU, slowly.

Dimension key: B rows  V vocabulary  G ids of a chunk  M chunks of a row, padded  N candidate groups
K = M * N candidates  W lanes of a search  n any number of ids

*Why a kernel.* On a GPU the host drives each loop of an XLA program, and waits for every iteration:
20 to 30 us, for the hundred that bisections take. A loop inside a kernel waits for nobody, and the
launch lies in the step's CUDA graph. One program takes one row, so a row waits for no other's path.

*How a row is cut.* In M chunks of G neighbouring ids; group g is the g-th id of every chunk, so
that groups' peaks are a maximum of chunks, lane by lane, and stay in registers. Candidates, chunk
by chunk and in a chunk by group, stand in order of id, which a draw walks.

*What it costs*, V = 128256: 513 KB of logits, from the L2 cache, where they have just been written.
A multiprocessor reads 80 to 110 GB/s: 5 to 7 us a walk over the row, 8 to 14 with keys and weights.
A question that registers answer takes 0.1 to 0.3 us, mostly two barriers. Walks over the row:

- greedy, inactive: 1, for peaks, maximum and id; about 7 us.
- no filter, or min_p alone: 2, the second for each chunk's mass; of the draw's 17 questions 13 are
  asked of one chunk, read again; about 25 us.
- top_k <= N, most nuclei (*narrow*): 1, or 2 where top_p is on and top_k off, for the mass of all;
  then 40 to 100 questions of the peaks and of the K candidates; 20 to 40 us.
- other rows (*wide*): those of a narrow one, then at most 13 walks for each of top_k and top_p, one
  for what top_k kept, one to draw; 100 to 300 us, for a nucleus mostly half of it. A walk asks
  _PIVOTS keys: 1 key needs 30 walks; 8 save three more, and arithmetic makes each a third longer.

Reckoned from an H200's data sheet and the compiler's output (registers, loads, no spills), not
measured.

*Nothing outside the row is read*: lanes past V are masked, and a masked lane is no access. A NaN
counts as inf and ends its row; a maximum in Triton would pass over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from . import thresholds
from .thresholds import NARROW

_LARGEST: Final = 1 << 19  # compiled without spilling a register up to here
_MOST_LANES: Final = 8192  # of a chunk: 16 registers a thread for each array of them
_PIVOTS: Final = 4


def unsupported(*, vocabulary: int) -> str | None:
    """Why there is no GPU kernel for this size, naming those that have one; None if there is."""
    if vocabulary > _LARGEST:
        return f"vocabulary: got {vocabulary}; allowed: up to {_LARGEST}"
    return None


@dataclass(frozen=True)
class _Cut:
    """How a row of V logits is cut; Triton knows no sizes but powers of two."""

    V: int

    @property
    def G(self) -> int:
        """Groups are many beside NARROW, and few enough for registers."""
        return min(max(pl.next_power_of_2(pl.cdiv(self.V, 8)), NARROW), _MOST_LANES)

    @property
    def M(self) -> int:
        return pl.next_power_of_2(pl.cdiv(self.V, self.G))

    @property
    def W(self) -> int:
        return min(self.G, _MOST_LANES // 4)

    @property
    def num_warps(self) -> int:
        """So that a thread holds at most 16 numbers of each array of a chunk."""
        return 16 if self.G == _MOST_LANES else 8 if self.G >= 2048 else 4


def sample(
    logits_BV: jax.Array,
    *,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    u_B: jax.Array,
    active_B: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What `sampling.sample` means, for float32 logits; `u_B` are the rows' `sampling.uniforms`.

    Raises ValueError when `unsupported` has something to say.
    """
    B, V = logits_BV.shape
    reason = unsupported(vocabulary=V)
    if reason is not None:
        raise ValueError(reason)
    cut = _Cut(V)
    shape: Any = jax.ShapeDtypeStruct
    # The groups are a program's own scratch. One place more, because interpreted, a masked store
    # writes back what it read: lanes that store nothing do it there.
    out_shape = shape((B,), jnp.int32), shape((B,), jnp.bool_), shape((B, NARROW + 1), jnp.int32)
    tokens_B, finite_B, _ = pl.pallas_call(
        partial(_sample_row, cut, interpret),
        grid=(B,),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=cut.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * V, transcendentals=B * V, bytes_accessed=2 * B * V * 4
        ),
        interpret=interpret,
        name="sample",
    )(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, u_B, active_B)
    return tokens_B, finite_B


def _sample_row(cut: _Cut, interpret: bool, logits_ref, *refs) -> None:
    *param_refs, token_ref, finite_ref, groups_ref = refs
    b = pl.program_id(0)
    temperature, top_k, top_p, min_p, u, active = (ref[b] for ref in param_refs)
    peak_G, max_, greedy = _peaks(cut, logits_ref, b)
    finite = (max_ > -jnp.inf) & (max_ < jnp.inf)
    row = _Row(cut, logits_ref, b, max_, temperature)
    filters = _Filters(top_k, top_p, min_p)

    def draw():
        threshold, token = lax.cond(
            (top_k > 0) | (top_p < 1),
            lambda: _search(row, peak_G, u, filters, groups_ref, interpret),
            lambda: (thresholds.min_p_key(min_p), filters.no_token),
        )
        return lax.cond(token < 0, lambda: row.draw(u, threshold), lambda: token)

    drawn = active & finite & (temperature > 0) & (top_k != 1)
    token_ref[b] = lax.cond(drawn, draw, lambda: greedy)
    finite_ref[b] = finite


@dataclass(frozen=True)
class _Filters:
    top_k: Any
    top_p: Any
    min_p: Any

    @property
    def no_token(self):
        """-1, but computed: in Triton's lowering a branch returns no literals."""
        return jnp.minimum(self.top_k, -1)

    def threshold(self, tokens: thresholds.Tokens, mass, bound):
        return thresholds.filter_threshold(
            tokens, mass, bound, top_k_B=self.top_k, top_p_B=self.top_p, min_p_B=self.min_p
        )


# -- Walks over a row in memory -------------------------------------------------------------------


def _load(cut: _Cut, logits_ref, b, id_n):
    return plgpu.load(logits_ref.at[b, id_n], mask=id_n < cut.V, other=-jnp.inf)


def _nan_to_inf(x_n):
    return jnp.where(jnp.isnan(x_n), jnp.inf, x_n)


def _walk(cut: _Cut, logits_ref, b, lanes: int, at_once: int, step: Callable, carry):
    """Fold `step(i, logits of the i-th `lanes` ids, carry)` over a row, the rest being -inf.

    What the next turn reads is on its way during this one: `at_once` times `lanes` logits.
    """
    lane_n = jnp.arange(lanes, dtype=jnp.int32)

    def load(turn):
        return [
            _load(cut, logits_ref, b, (turn * at_once + i) * lanes + lane_n) for i in range(at_once)
        ]

    def take(turn, state):
        loaded, carry = state
        ahead = load(turn + 1)
        for i, x_n in enumerate(loaded):
            carry = step(turn * at_once + i, _nan_to_inf(x_n), carry)
        return ahead, carry

    turns = pl.cdiv(cut.V, lanes * at_once)
    return lax.fori_loop(0, turns, take, (load(jnp.int32(0)), carry))[1]


def _peaks(cut: _Cut, logits_ref, b):
    """The largest logit of each group, and of all, and the lowest id that has it."""

    def step(m, x_G, carry):
        peak_G, chunk_G = carry
        higher_G = x_G > peak_G
        return jnp.where(higher_G, x_G, peak_G), jnp.where(higher_G, m, chunk_G)

    carry = jnp.full(cut.G, -jnp.inf, jnp.float32), jnp.zeros(cut.G, jnp.int32)
    peak_G, chunk_G = _walk(cut, logits_ref, b, cut.G, 2, step, carry)
    max_ = jnp.max(peak_G)
    id_G = chunk_G * cut.G + jnp.arange(cut.G, dtype=jnp.int32)
    return peak_G, max_, jnp.min(jnp.where(peak_G == max_, id_G, cut.V - 1))


@dataclass(frozen=True)
class _Row:
    """The tokens of one row, left in memory (`thresholds.Tokens`)."""

    cut: _Cut
    logits_ref: Any
    b: Any
    max: Any
    temperature: Any
    num_pivots: int = _PIVOTS

    def at(self, id_n):
        """Keys and weights of these ids; past the vocabulary they weigh nothing."""
        return self._keys_and_weights(_nan_to_inf(_load(self.cut, self.logits_ref, self.b, id_n)))

    def counts_to(self, keys: Sequence[Any]) -> Sequence[Any]:
        return self._sums_to(keys, jnp.int32, lambda reach_W, _: reach_W.astype(jnp.int32))

    def masses_to(self, keys: Sequence[Any]) -> Sequence[Any]:
        return self._sums_to(
            keys, jnp.float32, lambda reach_W, weight_W: jnp.where(reach_W, weight_W, 0.0)
        )

    def draw(self, u, threshold):
        """The token at which the running weight of those down to `threshold` passes `u` of it."""
        cut = self.cut
        chunk_M = jnp.arange(cut.M, dtype=jnp.int32)

        def kept(key_G, weight_G):
            return jnp.where(key_G <= threshold, weight_G, 0.0)

        def step(m, x_G, mass_M):
            mass = jnp.sum(kept(*self._keys_and_weights(x_G)))
            return jnp.where(chunk_M == m, mass, mass_M)

        mass_M = self._walk(cut.G, 1, step, jnp.zeros(cut.M, jnp.float32))
        m, rest = thresholds.first_beyond(mass_M, u * jnp.sum(mass_M))
        kept_G = kept(*self.at(m * cut.G + jnp.arange(cut.G, dtype=jnp.int32)))
        return m * cut.G + thresholds.first_beyond(kept_G, rest)[0]

    def _sums_to(self, keys: Sequence[Any], dtype: Any, value: Callable) -> Sequence[Any]:
        def step(_, x_W, sums):
            key_W, weight_W = self._keys_and_weights(x_W)
            return [
                sum_W + value(key_W <= key, weight_W) for sum_W, key in zip(sums, keys, strict=True)
            ]

        sums = self._walk(self.cut.W, 4, step, [jnp.zeros(self.cut.W, dtype) for _ in keys])
        return [jnp.sum(sum_W) for sum_W in sums]

    def _keys_and_weights(self, x_n):
        return thresholds.keys_and_weights(x_n, self.max, self.temperature)

    def _walk(self, lanes: int, at_once: int, step: Callable, carry):
        return _walk(self.cut, self.logits_ref, self.b, lanes, at_once, step, carry)


# -- Rows with top_k or top_p ---------------------------------------------------------------------


def _search(row: _Row, peak_G, u, filters: _Filters, groups_ref, interpret: bool):
    """The key down to which tokens are kept, and the token drawn if it is a candidate; else -1."""
    farthest = jnp.int32(thresholds.FARTHEST)
    mass = lax.cond(
        filters.top_k > 0,
        lambda: u,  # any number: it is not read
        lambda: row.masses_to([farthest])[0],
    )
    peak_key_G, _ = thresholds.keys_and_weights(peak_G, row.max, row.temperature)
    bound = thresholds.bound_of_nearest(peak_key_G, thresholds.groups_to_ask(filters.top_k), NARROW)
    id_K = _candidates(row, peak_key_G <= bound, groups_ref, interpret)
    key_K, weight_K = row.at(id_K)
    threshold = filters.threshold(thresholds.Held(key_K, weight_K), mass, bound)

    def near():
        kept_K = jnp.where(key_K <= threshold, weight_K, 0.0)
        at, _ = thresholds.first_beyond(kept_K, u * jnp.sum(kept_K))
        at_K = jnp.arange(id_K.size, dtype=jnp.int32)
        return threshold, jnp.sum(jnp.where(at_K == at, id_K, 0))

    def far():
        return filters.threshold(row, mass, farthest), filters.no_token

    return lax.cond(threshold <= bound, near, far)


def _candidates(row: _Row, near_G, groups_ref, interpret: bool):
    """The ids of the groups that are near, ascending; past the vocabulary where there are fewer."""
    cut, N = row.cut, jnp.int32(NARROW)
    one_G = near_G.astype(jnp.int32)
    slot_G = jnp.where(near_G, jnp.cumsum(one_G) - 1, N)
    group_G = jnp.arange(cut.G, dtype=jnp.int32)
    plgpu.store(groups_ref.at[row.b, slot_G], group_G, mask=near_G)
    if not interpret:  # where nothing runs beside anything
        plgpu.debug_barrier()
    at_K = jnp.arange(cut.M * NARROW, dtype=jnp.int32)
    slot_K = lax.rem(at_K, N)
    used_K = slot_K < jnp.sum(one_G)
    group_K = plgpu.load(groups_ref.at[row.b, slot_K], mask=used_K, other=0)
    return jnp.where(used_K, lax.div(at_K, N) * cut.G + group_K, cut.V)
