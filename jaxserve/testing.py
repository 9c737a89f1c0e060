"""Doubles and references that ship with the package, for its own tests and for its users'.

`FullRecompute` is what the engine's tokens are held to: no pages, no slices, no batch tricks; each
token comes from a forward pass over the whole sequence.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.kernels import sampling
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, Init, causal_attention
from jaxserve.request import MAX_STOP_TOKEN_IDS, SamplingParams


class FullRecompute:
    """Generates by recomputing everything for every token, in float32.

    Sequences of one call run side by side, padded at the right to `length` tokens; causal attention
    keeps them, and their padding, apart.
    """

    def __init__(self, config: ModelConfig, weights: Any, *, length: int):
        abstract = nnx.eval_shape(lambda: Decoder(config, init=Init(jnp.float32)))
        graphdef, state = nnx.split(abstract)
        nnx.replace_by_pure_dict(state, weights)
        self._config, self._length, self._state = config, length, state
        attend = causal_attention(config)

        def forward(state: Any, tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
            decoder = nnx.merge(graphdef, state)
            position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            hidden_BTD, _ = decoder(tokens_BT, position_BT, attend, None)
            return decoder.logits(hidden_BTD[jnp.arange(len(last_B)), last_B])

        self._forward = jax.jit(forward)
        self._draw = jax.jit(self._draw_tokens)

    def generate(
        self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams], seeds: Sequence[int]
    ) -> list[list[int]]:
        """The tokens of each prompt up to its max_tokens, a stop id or an end of sequence."""
        tokens = np.zeros((len(prompts), self._length), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: prompt.size] = prompt
        start = np.array([prompt.size for prompt in prompts], np.int32)
        length, packed = start.copy(), _pack(params, seeds)
        counts = np.zeros((len(prompts), self._config.vocab_size), np.int32)
        for row, prompt in zip(counts, prompts, strict=True):
            row[prompt] |= sampling.PROMPT_FLAG
        bias = np.zeros(counts.shape, np.float32)
        for row, each in zip(bias, params, strict=True):
            for token, value in each.logit_bias.items():
                row[token] = value
        most = np.array([each.max_tokens for each in params], np.int32)
        going = np.ones(len(prompts), bool)
        while going.any():
            logits_BV = self._forward(self._state, tokens, length - 1)
            drawn, stops = self._draw(logits_BV, counts, bias, packed, length, length - start)
            for b in np.flatnonzero(going):
                token = int(drawn[b])
                tokens[b, length[b]] = token
                counts[b, token] += 1
                length[b] += 1
                going[b] = not stops[b] and length[b] - start[b] < most[b]
        return [
            row[first:last].tolist() for row, first, last in zip(tokens, start, length, strict=True)
        ]

    def _draw_tokens(
        self,
        logits_BV: jax.Array,
        counts_BV: jax.Array,
        bias_BV: jax.Array,
        params: sampling.RowParams,
        position_B: jax.Array,
        made_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        eos = jnp.array(self._config.eos_token_ids, jnp.int32)
        x_BV = sampling.apply_extras(logits_BV, counts_BV, bias_BV, params)
        x_BV = sampling.ban_stop_ids(x_BV, made_B, params, eos)
        active_B = jnp.ones(made_B.shape, bool)
        drawn_B, _ = sampling.sample(x_BV, params, position_B, active_B, backend="xla")
        return drawn_B, sampling.is_stop(drawn_B, params, eos)


def _pack(params: Sequence[SamplingParams], seeds: Sequence[int]) -> sampling.RowParams:
    def column(name: str, dtype: Any) -> jax.Array:
        return jnp.array([getattr(each, name) for each in params], dtype)

    stop = np.full((len(params), MAX_STOP_TOKEN_IDS), -1, np.int32)
    for row, each in zip(stop, params, strict=True):
        row[: len(each.stop_token_ids)] = each.stop_token_ids
    return sampling.RowParams(
        temperature_B=column("temperature", np.float32),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        repetition_B=column("repetition_penalty", np.float32),
        presence_B=column("presence_penalty", np.float32),
        frequency_B=column("frequency_penalty", np.float32),
        seed_B=jnp.array(seeds, jnp.uint32),
        min_tokens_B=column("min_tokens", np.int32),
        ignore_eos_B=column("ignore_eos", np.bool_),
        stop_ids_BE=jnp.array(stop),
    )
