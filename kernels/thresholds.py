"""Find per row which tokens a filter keeps, and draw among them, by bisection instead of a sort.

Knows keys and weights, one row beside another; knows no sampling parameter but top_k, top_p, min_p.
What finds a threshold and draws takes one row without an axis of rows as well: a kernel's.

Dimension key: B rows  V vocabulary  G groups of neighbouring ids  M members of a group
               N slots  W words of 32 bits  n any number of tokens

`d = (max - logit) / temperature`, in float32, is a token's distance in nats from the row's
likeliest. Its *key* is d in ticks of 2**-24 nats, an int32, so that a threshold is found by
bisection in at most 30 steps; its *weight* is exp(-d). Every filter is then one threshold, and the
tokens with `key <= min(thresholds)` are kept:

- top_k: the least key that at least top_k tokens reach.
- top_p: the least key whose tokens hold top_p of the weight that top_k kept (of all, if it is off).
- min_p: a probability of at least min_p times the likeliest token's.

Tokens tied at a threshold are all kept, so the result does not depend on an order among equals.
What lies 32 nats or further out (probability < 1.3e-14, finer than a float32 draw resolves) has
weight 0 and one common key.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, Shaped

# Tuned on 2 CPU cores with 64 rows of 4096: 128 groups slow the usual row by 1/7, 32 send it (top_k
# 50) down the wide path.
NARROW: Final = 64  # candidate groups
FARTHEST: Final = 32 << 24  # key of everything 32 nats or more below the likeliest token
_ENOUGH: Final = NARROW * 7 // 8  # groups to stop at where no top_k asks for more: saves rounds
_TICKS: Final = 2.0**24  # key units per nat: finer than float32 resolves a weight

_Verdicts = Sequence[tuple[Array, Array]]  # per key: whether it is low enough, and high enough


@runtime_checkable
class Tokens(Protocol):
    """Tokens of each row, wherever they lie, and what those down to some keys amount to."""

    @property
    def num_pivots(self) -> int:
        """Keys to ask for at once: more where every question costs a walk over the tokens."""
        ...

    def counts_to(self, keys: Sequence[Array]) -> Sequence[Array]:
        """How many tokens of each row reach each of these keys; int32."""
        ...

    def masses_to(self, keys: Sequence[Array]) -> Sequence[Array]:
        """The weight of the tokens that do."""
        ...


@dataclass(frozen=True)
class Held:
    """Tokens whose keys and weights are arrays."""

    key_Bn: Array
    weight_Bn: Array
    num_pivots: int = 1

    def counts_to(self, keys: Sequence[Array]) -> Sequence[Array]:
        return [_count(self.key_Bn, key_B) for key_B in keys]

    def masses_to(self, keys: Sequence[Array]) -> Sequence[Array]:
        return [_mass_to(self.key_Bn, key_B, self.weight_Bn) for key_B in keys]


def keys_and_weights(
    x_Bn: Float[Array, "*B n"], max_B: Float[Array, "*B"], temperature_B: Float[Array, "*B"]
) -> tuple[Int32[Array, "*B n"], Float[Array, "*B n"]]:
    """Return key_Bn and weight_Bn of logits whose row maximum is `max_B`; temperature is > 0."""
    d_Bn = (max_B[..., None] - x_Bn) / temperature_B[..., None]
    d_Bn = jnp.where(d_Bn < FARTHEST / _TICKS, d_Bn, jnp.inf)  # NaN too, so that keys are in range
    return jnp.minimum(d_Bn * _TICKS, FARTHEST).astype(jnp.int32), jnp.exp(-d_Bn)


def filter_threshold(
    tokens: Tokens,
    mass_B: Float[Array, "*B"],
    bound_B: Int32[Array, "*B"],
    *,
    top_k_B: Int32[Array, "*B"],
    top_p_B: Float[Array, "*B"],
    min_p_B: Float[Array, "*B"],
) -> Int32[Array, "*B"]:
    """Return the key down to which each row keeps tokens, right wherever it is <= `bound_B`.

    Keys up to `bound_B` are all present; beyond it some may be missing, and the answer is then only
    known to lie beyond it. `mass_B` is the weight of the whole vocabulary, read if top_k is off.
    """
    top_k_on_B = top_k_B > 0
    all_B = jnp.full_like(bound_B, FARTHEST)

    def judge_counts(keys: Sequence[Array]) -> _Verdicts:
        counts = tokens.counts_to(keys)
        return [(count_B <= top_k_B, count_B >= top_k_B) for count_B in counts]

    ends = jnp.where(top_k_on_B, -1, all_B), all_B
    _, by_k_B = _bisect(judge_counts, *ends, num_pivots=tokens.num_pivots)
    target_B = top_p_B * jnp.where(top_k_on_B, tokens.masses_to([by_k_B])[0], mass_B)

    def judge_masses(keys: Sequence[Array]) -> _Verdicts:
        return [
            _judge_mass(key_B, mass_B, target_B)
            for key_B, mass_B in zip(keys, tokens.masses_to(keys), strict=True)
        ]

    ends = jnp.where(top_p_B < 1, -1, by_k_B), by_k_B
    _, by_p_B = _bisect(judge_masses, *ends, num_pivots=tokens.num_pivots)
    # What top_k kept beyond the bound may be missing here, and a nucleus of it is a guess.
    guess_B = top_k_on_B & (by_k_B > bound_B) & (top_p_B < 1)
    return jnp.where(guess_B, FARTHEST + 1, jnp.minimum(by_p_B, min_p_key(min_p_B)))


def min_p_key(min_p_B: Float[Array, "*B"]) -> Int32[Array, "*B"]:
    """The key down to which min_p alone keeps tokens."""
    return jnp.minimum(-jnp.log(min_p_B) * _TICKS, FARTHEST).astype(jnp.int32)


def groups_to_ask(top_k_B: Int32[Array, "*B"]) -> Int32[Array, "*B"]:
    """How many of the likeliest groups are candidates at the least, if there are so many."""
    return jnp.where((top_k_B > 0) & (top_k_B <= NARROW), top_k_B, _ENOUGH)


def bound_of_nearest(
    key_BG: Int32[Array, "*B G"], least_B: Int32[Array, "*B"], most: int
) -> Int32[Array, "*B"]:
    """Return a key that at most `most` entries of each row reach; `least_B` do, if ties allow."""

    def judge(keys: Sequence[Array]) -> _Verdicts:
        counts = [_count(key_BG, key_B) for key_B in keys]
        return [(count_B <= most, count_B >= least_B) for count_B in counts]

    ends = jnp.full_like(least_B, -1), jnp.full_like(least_B, FARTHEST + 1)
    return _bisect(judge, *ends)[0]


def _judge_mass(key_B: Array, mass_B: Array, target_B: Array) -> tuple[Array, Array]:
    """Whether the mass down to a key loses none of the last tokens that make up the target.

    Each token down to this key weighs at least exp(-key): a mass in [target, target + that) can
    lose none of them, so this key parts the tokens as well as their own least one does. Half the
    rounds are saved by stopping there.
    """
    least_B = jnp.exp(key_B.astype(jnp.float32) / -_TICKS)
    return mass_B < target_B + least_B, mass_B >= target_B


def _bisect(
    judge: Callable[[Sequence[Array]], _Verdicts],
    lo_B: Array,
    hi_B: Array,
    *,
    num_pivots: int = 1,
) -> tuple[Array, Array]:
    """Narrow (lo, hi) until neighbours; `judge` says per key and row if it is (low, high) enough.

    A key that is both is returned as both ends. Otherwise lo was low enough and hi high enough,
    or they are the ends given. Rows with hi - lo <= 1 at the start are left alone. `judge` gets
    `num_pivots` ascending keys that cut the bracket into equal parts.
    """

    def narrow(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        lo_B, hi_B = bracket
        open_B = hi_B - lo_B > 1
        part_B = jnp.maximum((hi_B - lo_B) // (num_pivots + 1), 1)
        keys = [jnp.minimum(lo_B + part_B * i, hi_B - 1) for i in range(1, num_pivots + 1)]
        for key_B, (low_B, high_B) in zip(keys, judge(keys), strict=True):
            lo_B = jnp.where(open_B & low_B, key_B, lo_B)
            hi_B = jnp.where(open_B & high_B, jnp.minimum(key_B, hi_B), hi_B)
        return jnp.minimum(lo_B, hi_B), hi_B  # several keys may be both: the lowest is taken

    # The largest width, not `any`: Triton's lowering reduces no booleans.
    return lax.while_loop(lambda ends: jnp.max(ends[1] - ends[0]) > 1, narrow, (lo_B, hi_B))


def _count(key_Bn: Array, key_B: Array) -> Array:
    return jnp.sum(key_Bn <= key_B[..., None], axis=-1, dtype=jnp.int32)


def _mass_to(key_Bn: Array, key_B: Array, weight_Bn: Array) -> Array:
    return jnp.sum(jnp.where(key_Bn <= key_B[..., None], weight_Bn, 0.0), axis=-1)


def draw_in_order(weight_BGM: Float[Array, "B G M"], u_B: Float[Array, " B"]) -> Int32[Array, " B"]:
    """Return the index g * M + m at which each row's running weight passes `u_B` of its total.

    `u_B` is in [0, 1). Two more bisections, over groups and then over one group's members; an index
    of weight 0 is never drawn, unless all are 0.
    """
    M = weight_BGM.shape[2]
    sum_BG = jnp.sum(weight_BGM, axis=-1)
    group_B, rest_B = first_beyond(sum_BG, u_B * jnp.sum(sum_BG, axis=-1))
    member_B, _ = first_beyond(take_along(weight_BGM, group_B[:, None])[:, 0], rest_B)
    return group_B * M + member_B


def first_beyond(
    weight_Bn: Float[Array, "*B n"], target_B: Float[Array, "*B"]
) -> tuple[Int32[Array, "*B"], Float[Array, "*B"]]:
    """Return the first index whose running weight exceeds target, and target less what is before.

    `target_B` is >= 0. Rounding may let none exceed it; then it is the last index of positive
    weight. Sums masked at neighbouring indices round monotonically, so that the first one is well
    defined, which a parallel running sum (slow on CPU besides) does not promise.
    """
    index_Bn = lax.broadcasted_iota(jnp.int32, weight_Bn.shape, weight_Bn.ndim - 1)

    def judge(indices: Sequence[Array]) -> _Verdicts:
        beyond = [_mass_to(index_Bn, at_B, weight_Bn) > target_B for at_B in indices]
        return [(~beyond_B, beyond_B) for beyond_B in beyond]

    last_B = jnp.max(jnp.where(weight_Bn > 0, index_Bn, 0), axis=-1)
    _, first_B = _bisect(judge, jnp.full_like(last_B, -1), last_B)
    return first_B, jnp.maximum(target_B - _mass_to(index_Bn, first_B - 1, weight_Bn), 0.0)


def grouped(x_BV: Float[Array, "B V"], num_wanted: int) -> Float[Array, "B G M"]:
    """View V as groups of neighbours, padded with -inf.

    M balances the G = V / M groups to search against the `num_wanted` * M members to look at then.
    """
    B, V = x_BV.shape
    M = 1 << max(0, round(math.log2(V / num_wanted) / 2))  # for 64: 8 of 4096, 32 of 128256
    if V % M:
        x_BV = jnp.pad(x_BV, ((0, 0), (0, -V % M)), constant_values=-jnp.inf)
    return x_BV.reshape(B, -1, M)


def first_true(mask_Bn: Bool[Array, "B n"]) -> Int32[Array, " B"]:
    """Return the index of each row's first True; the last index if there is none."""
    index_Bn = lax.broadcasted_iota(jnp.int32, mask_Bn.shape, 1)
    return jnp.min(jnp.where(mask_Bn, index_Bn, mask_Bn.shape[1] - 1), axis=-1)


def true_positions(
    mask_BG: Bool[Array, "B G"], num: int
) -> tuple[Int32[Array, "B N"], Bool[Array, "B N"]]:
    """Return ascending positions of the first `num` True of each row, and which slots are used.

    Bits in 32-bit words: a slot finds its word by comparing prefix counts, and its bit by halving.
    The plain way, a running sum over G and a scatter, took 206 us instead of 42 (B 64, G 512, CPU).
    """
    B, G = mask_BG.shape
    bits_BW32 = jnp.pad(mask_BG, ((0, 0), (0, -G % 32))).reshape(B, -1, 32)
    shift = lax.broadcasted_iota(jnp.uint32, bits_BW32.shape, 2)
    word_BW = jnp.sum(bits_BW32.astype(jnp.uint32) << shift, axis=-1, dtype=jnp.uint32)
    end_BW = jnp.cumsum(_popcount(word_BW), axis=-1)
    slot_BN = lax.broadcasted_iota(jnp.int32, (B, num), 1)
    before_BNW = end_BW[:, None, :] <= slot_BN[:, :, None]
    at_BN = jnp.minimum(jnp.sum(before_BNW, axis=-1, dtype=jnp.int32), end_BW.shape[1] - 1)
    word_BN = take_along(word_BW, at_BN)
    rank_BN = slot_BN - (take_along(end_BW, at_BN) - _popcount(word_BN))
    bit_BN = jnp.zeros_like(slot_BN)
    for width in (16, 8, 4, 2, 1):
        low_BN = _popcount((word_BN >> bit_BN.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1))
        up_BN = rank_BN >= low_BN
        rank_BN = jnp.where(up_BN, rank_BN - low_BN, rank_BN)
        bit_BN = jnp.where(up_BN, bit_BN + width, bit_BN)
    return jnp.minimum(at_BN * 32 + bit_BN, G - 1), slot_BN < end_BW[:, -1:]


def _popcount(word: Array) -> Array:
    return lax.population_count(word).astype(jnp.int32)


def take_along(
    x_Bn: Shaped[Array, "B n *m"], at_BN: Int32[Array, "B N"]
) -> Shaped[Array, "B N *m"]:
    """Return `x_Bn[b, at_BN[b, i]]`; indices must be in range.

    Said to lax: indexing through jnp compiles wrap-around and bounds checks into every use.
    """
    return jax.vmap(
        lambda x, at: x.at[at].get(mode="promise_in_bounds", wrap_negative_indices=False)
    )(x_Bn, at_BN)
