"""Draw the next token of every row from its logits: greedy, top-k, top-p, min-p, without a sort.

Knows logits and per-row numbers; knows no request, no tokenizer and no page. Made to run inside the
slice program's `lax.while_loop`, where each array below is a row's own and rows never mix.

Dimension key: B rows  V vocabulary  R resident rows (device state, by slot)  T tokens  E ids
               G groups of neighbouring ids  M members of a group  N candidate groups
               K candidate tokens  C rows in one pass of the wide path

**Order of steps:** bias, penalties (`apply_extras`), stop ids (`ban_stop_ids`), temperature, top_k
over all tokens, top_p over what top_k kept (renormalised), min_p relative to the likeliest token,
draw. `thresholds.py` defines what each filter keeps, ties included.

**How it is fast.** A threshold costs passes over keys, so passes should see few of them. The
NARROW likeliest groups hold every token down to some key, the row's `bound`. If its threshold turns
out to be <= bound, those candidates were enough (*narrow* path: top_k <= NARROW, and most nuclei).
Other rows (*wide*: larger top_k, flat nuclei, no filter) get passes over the vocabulary, WIDE_ROWS
at a time, so that one flat row does not make all others pay.

**Laws.** A row's token is a function of its own logits, parameters, seed and position: its path is
chosen by its own keys, and both paths draw from the same set in the same way. A draw walks the
kept tokens in order of id, not of weight: when logits change in the last bit (another batch shape),
a token's boundaries move by as little; a changed *order* would hand the draw to another token.

On a GPU one kernel does what `sample` says, with the same thresholds (sampling_gpu.py); everywhere
else it is XLA. They may part where a number falls on the boundary between two tokens, or a token
on a threshold: there, sums, divisions and exponentials in float32 round otherwise.

*Refused:* `lax.top_k` (64 of 4096 for 64 rows takes 1.6 ms on 2 CPU cores, over twice this whole
path), and rejection sampling (as many passes, and more than one number per draw).
Sources: order of steps, vLLM V1, but for min_p, which it puts before top_k; pivot search, Park et
al. 2026 (Qrita); penalties, Keskar et al. 2019 (repetition) and the OpenAI API (the others).
"""

from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, UInt32

from . import backend as backends
from . import thresholds
from .thresholds import NARROW

N_TOP: Final = 20  # most alternatives a row may ask log-probabilities of
PROMPT_FLAG: Final = 1 << 30  # in counts: the token occurs in the prompt; lower bits count outputs
# Tuned on 2 CPU cores with 64 rows of 4096: 16 rows at a time take 1.6x as long where all are wide.
WIDE_ROWS: Final = 8  # rows per pass of the wide path

_IMPL: Final = "threefry2x32"  # pinned: the only generator whose draws are the same under vmap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowParams:
    """How each of B rows is sampled. The caller has checked the ranges; nothing here re-checks."""

    temperature_B: Float[Array, " B"]  # 0 is greedy
    top_k_B: Int32[Array, " B"]  # 0 is off; 1 is greedy
    top_p_B: Float[Array, " B"]  # in (0, 1]; 1 is off
    min_p_B: Float[Array, " B"]  # in [0, 1]; 0 is off
    repetition_B: Float[Array, " B"]  # > 0; 1 is off; over prompt and output
    presence_B: Float[Array, " B"]  # 0 is off; over output only
    frequency_B: Float[Array, " B"]  # 0 is off; over output only
    seed_B: UInt32[Array, " B"]
    min_tokens_B: Int32[Array, " B"]  # no stop id is drawn before so many output tokens
    ignore_eos_B: Bool[Array, " B"]  # the model's end-of-sequence ids neither stop nor are banned
    stop_ids_BE: Int32[Array, "B E"]  # the request's own stop ids, padded with -1


def sample(
    logits_BV: Float[Array, "B V"],
    params: RowParams,
    position_B: Int32[Array, " B"],
    active_B: Bool[Array, " B"],
    *,
    backend: str = "auto",
) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """Return each row's token and whether its logits were usable (`finite_B`).

    `logits_BV` come after `apply_extras` and `ban_stop_ids`; `position_B` is the absolute position
    of the token to be drawn. Greedy rows (temperature 0 or top_k 1) take the lowest of the
    likeliest ids, and so do inactive rows. Where a row's largest logit is NaN, inf or -inf,
    `finite_B` is False and the token means nothing (though it is a valid id): the caller ends the
    row. Backends disagree whether a lone NaN is the largest; where it is not, it is never drawn.
    Raises ValueError when the backend is unknown, does not run here or takes no such vocabulary.
    """
    backend = backends.resolve(backend)
    if implementation(backend) == backends.PALLAS_GPU:
        # Pallas is imported where it is chosen, not before.
        from . import sampling_gpu

        return sampling_gpu.sample(
            logits_BV,
            temperature_B=params.temperature_B,
            top_k_B=params.top_k_B,
            top_p_B=params.top_p_B,
            min_p_B=params.min_p_B,
            u_B=uniforms(params.seed_B, position_B),
            active_B=active_B,
            interpret=backends.is_interpreted(backend),
        )
    B, V = logits_BV.shape
    x_BGM = thresholds.grouped(logits_BV, NARROW)
    peak_BG = jnp.max(x_BGM, axis=-1)
    max_B = jnp.max(peak_BG, axis=-1)
    finite_B = jnp.isfinite(max_B)
    group_B = thresholds.first_true(peak_BG == max_B[:, None])
    member_B = thresholds.first_true(x_BGM[jnp.arange(B), group_B] == max_B[:, None])
    greedy_B = jnp.minimum(group_B * x_BGM.shape[2] + member_B, V - 1)
    drawn_B = active_B & finite_B & (params.temperature_B > 0) & (params.top_k_B != 1)

    def draw() -> Array:
        return jnp.where(
            drawn_B, _draw(x_BGM, peak_BG, max_B, params, position_B, drawn_B), greedy_B
        )

    return lax.cond(jnp.any(drawn_B), draw, lambda: greedy_B), finite_B


def implementation(backend: str) -> str:
    """What samples where a resolved `backend` attends: the GPU's kernel, or XLA."""
    return backend if backend == backends.PALLAS_GPU else backends.XLA


def unsupported(backend: str, *, vocabulary: int) -> str | None:
    """Why a backend has no kernel for this size, naming those that have one; None if there is."""
    if implementation(backend) != backends.PALLAS_GPU:
        return None
    from . import sampling_gpu

    return sampling_gpu.unsupported(vocabulary=vocabulary)


def uniforms(seed_B: UInt32[Array, " B"], position_B: Int32[Array, " B"]) -> Float[Array, " B"]:
    """One number in [0, 1) per row, from fold_in(fold_in(base, seed), absolute position)."""

    def one(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(0, impl=_IMPL), seed)
        return jax.random.key_data(jax.random.fold_in(key, position))[0]

    # The key's own bits are the draw: it is used once, so hashing it once more would add nothing.
    bits_B = jax.vmap(one)(seed_B, position_B)
    return (bits_B >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def apply_extras(
    logits_BV: Float[Array, "B V"],
    counts_BV: Int32[Array, "B V"],
    bias_BV: Float[Array, "B V"],
    params: RowParams,
) -> Float[Array, "B V"]:
    """Add the bias, then divide (or multiply, if negative) what was seen, then subtract penalties.

    Call it under `lax.cond`, only when some row uses an extra: it reads three arrays of B x V.
    """
    x_BV = logits_BV + bias_BV
    repetition_B1 = params.repetition_B[:, None]
    repeated_BV = jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1)
    x_BV = jnp.where(counts_BV != 0, repeated_BV, x_BV)
    outputs_BV = (counts_BV & (PROMPT_FLAG - 1)).astype(jnp.float32)
    x_BV = x_BV - params.frequency_B[:, None] * outputs_BV
    return x_BV - jnp.where(outputs_BV > 0, params.presence_B[:, None], 0.0)


def count_tokens(
    counts_RV: Int32[Array, "R V"],
    slots_T: Int32[Array, " T"],
    tokens_T: Int32[Array, " T"],
    active_T: Bool[Array, " T"],
) -> Int32[Array, "R V"]:
    """Count output tokens, `tokens_T[i]` for the row in slot `slots_T[i]`, where active."""
    slots_T = jnp.where(active_T, slots_T, counts_RV.shape[0])
    return counts_RV.at[slots_T, tokens_T].add(1, mode="drop")


def mark_prompt(
    counts_RV: Int32[Array, "R V"],
    slots_T: Int32[Array, " T"],
    tokens_T: Int32[Array, " T"],
    active_T: Bool[Array, " T"],
) -> Int32[Array, "R V"]:
    """Flag prompt tokens, `tokens_T[i]` for the row in slot `slots_T[i]`, where active."""
    slots_T = jnp.where(active_T, slots_T, counts_RV.shape[0])
    flagged_T = counts_RV.at[slots_T, tokens_T].get(mode="clip") | PROMPT_FLAG
    return counts_RV.at[slots_T, tokens_T].set(flagged_T, mode="drop")  # repeats write one value


def ban_stop_ids(
    logits_BV: Float[Array, "B V"],
    made_B: Int32[Array, " B"],
    params: RowParams,
    eos_ids_E: Int32[Array, " e"],
) -> Float[Array, "B V"]:
    """Set the ids that would stop a row to -inf while it has made fewer than min_tokens tokens."""
    B, V = logits_BV.shape
    banned_B = bans(made_B, params)

    def ban() -> Array:
        ids_BE = _stop_ids(params, eos_ids_E)
        ids_BE = jnp.where(
            banned_B[:, None] & (ids_BE >= 0), ids_BE, V
        )  # V is dropped, -1 would wrap
        return logits_BV.at[jnp.arange(B)[:, None], ids_BE].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(banned_B), ban, lambda: logits_BV)


def bans(made_B: Int32[Array, " B"], params: RowParams) -> Bool[Array, " B"]:
    """Whether `ban_stop_ids` changes a row's logits."""
    return made_B < params.min_tokens_B


def is_stop(
    tokens_B: Int32[Array, " B"], params: RowParams, eos_ids_E: Int32[Array, " e"]
) -> Bool[Array, " B"]:
    """Whether each row's token is one of its stop ids or, unless ignored, an end of sequence."""
    return jnp.any(tokens_B[:, None] == _stop_ids(params, eos_ids_E), axis=-1)


def token_logprobs(
    logits_BV: Float[Array, "B V"], tokens_B: Int32[Array, " B"], want: Bool[Array, ""]
) -> tuple[Float[Array, " B"], Int32[Array, "B n"], Float[Array, "B n"]]:
    """Log-probability of `tokens_B`, and the ids and log-probabilities of the N_TOP likeliest.

    These are the model's own: pass the raw logits, before bias, penalties, bans and temperature.
    Best first, the lower id first among equals; past a vocabulary smaller than N_TOP the ids are -1
    and the values -inf. Without `want` nothing is computed, the ids are -1 and the values 0.
    """
    B, V = logits_BV.shape

    def compute() -> tuple[Array, Array, Array]:
        max_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        norm_B1 = max_B1 + jnp.log(jnp.sum(jnp.exp(logits_BV - max_B1), axis=-1, keepdims=True))
        ids_Bn, top_Bn = _likeliest(logits_BV, min(N_TOP, V))
        pad = ((0, 0), (0, N_TOP - ids_Bn.shape[1]))
        return (
            (thresholds.take_along(logits_BV, tokens_B[:, None]) - norm_B1)[:, 0],
            jnp.pad(ids_Bn, pad, constant_values=-1),
            jnp.pad(top_Bn - norm_B1, pad, constant_values=-jnp.inf),
        )

    def skip() -> tuple[Array, Array, Array]:
        zeros_Bn = jnp.zeros((B, N_TOP), jnp.float32)
        return zeros_Bn[:, 0], jnp.full((B, N_TOP), -1, jnp.int32), zeros_Bn

    return lax.cond(want, compute, skip)


def _draw(
    x_BGM: Array, peak_BG: Array, max_B: Array, params: RowParams, position_B: Array, drawn_B: Array
) -> Array:
    """Draw for every row in `drawn_B`; the others' tokens mean nothing."""
    B, _, M = x_BGM.shape
    u_B = uniforms(params.seed_B, position_B)
    temperature_B = jnp.where(drawn_B, params.temperature_B, 1.0)

    peak_key_BG, _ = thresholds.keys_and_weights(peak_BG, max_B, temperature_B)
    asked_B = jnp.minimum(thresholds.groups_to_ask(params.top_k_B), peak_key_BG.shape[1])
    bound_B = thresholds.bound_of_nearest(peak_key_BG, asked_B, NARROW)
    groups_BN, used_BN = thresholds.true_positions(peak_key_BG <= bound_B[:, None], NARROW)
    x_BNM = thresholds.take_along(x_BGM, groups_BN)
    x_BK = jnp.where(used_BN[:, :, None], x_BNM, -jnp.inf).reshape(B, -1)

    def vocabulary_mass() -> Array:
        _, weight_BV = thresholds.keys_and_weights(x_BGM.reshape(B, -1), max_B, temperature_B)
        return jnp.sum(weight_BV, axis=-1)

    nucleus_B = drawn_B & (params.top_k_B == 0) & (params.top_p_B < 1)
    mass_B = lax.cond(jnp.any(nucleus_B), vocabulary_mass, lambda: jnp.zeros_like(max_B))

    key_BK, weight_BK = thresholds.keys_and_weights(x_BK, max_B, temperature_B)
    kept_BK, threshold_B = _kept(key_BK, weight_BK, mass_B, bound_B, params)
    at_B = thresholds.draw_in_order(kept_BK.reshape(x_BNM.shape), u_B)
    tokens_B = thresholds.take_along(groups_BN, (at_B // M)[:, None])[:, 0] * M + at_B % M
    wide_B = drawn_B & (threshold_B > bound_B)
    return lax.cond(
        jnp.any(wide_B),
        lambda: _draw_wide(x_BGM, max_B, params, u_B, wide_B, tokens_B),
        lambda: tokens_B,
    )


def _draw_wide(
    x_BGM: Array, max_B: Array, params: RowParams, u_B: Array, wide_B: Array, tokens_B: Array
) -> Array:
    """Replace the tokens of the rows in `wide_B`, looking at their whole vocabulary."""
    B, G, M = x_BGM.shape
    C = min(WIDE_ROWS, B)
    x_BV = x_BGM.reshape(B, -1)
    order_B = jnp.argsort(~wide_B, stable=True)

    def chunk(i: Array, tokens_B: Array) -> Array:
        rows_C = order_B[jnp.minimum(i * C + jnp.arange(C), B - 1)]
        # Row by row: as one gather, XLA on CPU takes the 8 x 4096 logits one at a time.
        x_CV = jnp.concatenate([lax.dynamic_slice_in_dim(x_BV, rows_C[c], 1) for c in range(C)])
        own: RowParams = jax.tree.map(lambda a: a[rows_C], params)
        key_CV, weight_CV = thresholds.keys_and_weights(x_CV, max_B[rows_C], own.temperature_B)
        complete_C = jnp.full(C, thresholds.FARTHEST)
        kept_CV, _ = _kept(key_CV, weight_CV, jnp.sum(weight_CV, axis=-1), complete_C, own)
        target_C = jnp.where(wide_B[rows_C], rows_C, B)  # B is dropped
        drawn_C = thresholds.draw_in_order(kept_CV.reshape(C, G, M), u_B[rows_C])
        return tokens_B.at[target_C].set(drawn_C, mode="drop")

    num_chunks = (jnp.sum(wide_B, dtype=jnp.int32) + (C - 1)) // C
    return lax.fori_loop(0, num_chunks, chunk, tokens_B)


def _kept(
    key_Bn: Array, weight_Bn: Array, mass_B: Array, bound_B: Array, params: RowParams
) -> tuple[Array, Array]:
    """The weights with what the filters drop set to 0, and the threshold that says so."""
    threshold_B = thresholds.filter_threshold(
        thresholds.Held(key_Bn, weight_Bn),
        mass_B,
        bound_B,
        top_k_B=params.top_k_B,
        top_p_B=params.top_p_B,
        min_p_B=params.min_p_B,
    )
    return jnp.where(key_Bn <= threshold_B[:, None], weight_Bn, 0.0), threshold_B


def _likeliest(x_BV: Array, n: int) -> tuple[Array, Array]:
    """Ids and values of each row's n largest, best first, the lower id first among equals.

    The n groups with the largest peaks hold them; kept in order of id, so do ties.
    """
    x_BGM = thresholds.grouped(x_BV, n)
    B, G, M = x_BGM.shape
    # Both outputs of top_k stay in use: with one unused, XLA on CPU sorts all of G, which is 20
    # times slower (jax 0.10.2). No number is above infinity, but no compiler pass looks for that.
    # (An optimization_barrier does not do: programs of several devices then fail to compile.)
    peaks_Bn, groups_Bn = lax.top_k(jnp.max(x_BGM, axis=-1), min(n, G))
    groups_Bn = groups_Bn + (peaks_Bn > jnp.inf).astype(jnp.int32)
    groups_Bn = jnp.sort(groups_Bn, axis=-1)
    x_BK = thresholds.take_along(x_BGM, groups_Bn).reshape(B, -1)
    top_Bn, at_Bn = lax.top_k(x_BK, n)
    return thresholds.take_along(groups_Bn, at_Bn // M) * M + at_Bn % M, top_Bn


def _stop_ids(params: RowParams, eos_ids_E: Array) -> Array:
    eos_BE = jnp.where(params.ignore_eos_B[:, None], -1, eos_ids_E[None, :])
    return jnp.concatenate([params.stop_ids_BE, eos_BE], axis=1)
