"""Trains a decoder on token streams: the loop behind `scripts/train_demo`.

Knows the decoder and an optimiser; knows no files and no terminal. Training is a generator of
reports, so that the caller draws its progress and saves each best model as it comes.

Dimension key: B rows  T tokens  H query heads  K kv heads  C channels per head  V vocabulary
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxserve.clock import Clock
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, Init, causal_attention
from jaxserve.models.training_text import RowSampler, TokenStream, evaluation_rows

Params = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """How long and how to train: `steps`, or `minutes` of wall time, and the optimiser's numbers.

    Every step takes `tokens_per_step` tokens, in rows of `row_tokens`; the last
    `long_context_share` of the run takes them in rows of `long_row_tokens`, so that late positions
    are trained too. With `steps` a run repeats exactly; with `minutes` it depends on the machine.
    """

    steps: int | None = None
    minutes: float | None = None
    tokens_per_step: int = 4096
    row_tokens: int = 256
    long_row_tokens: int = 1024
    long_context_share: float = 0.1
    peak_learning_rate: float = 4e-3
    warm_up_share: float = 0.03
    weight_decay: float = 0.1
    dialogue_weight: float = 2.0
    num_tests: int = 10
    test_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError(f"got steps={self.steps}, minutes={self.minutes}; give one of them")
        for rows in (self.row_tokens, self.long_row_tokens):
            if self.tokens_per_step % rows:
                raise ConfigError(
                    f"tokens_per_step: got {self.tokens_per_step};"
                    f" allowed: a multiple of {rows}, the tokens of a row"
                )

    def learning_rate(self, progress: float) -> float:
        """Linear warm-up, then a cosine to zero; `progress` runs from 0 to 1."""
        if progress < self.warm_up_share:
            return self.peak_learning_rate * (progress / self.warm_up_share)
        left = (progress - self.warm_up_share) / (1 - self.warm_up_share)
        return self.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step done; `bits_per_byte` is the held-out loss when the step was followed by a test."""

    step: int
    progress: float
    nats_per_token: float
    tokens_per_s: float
    bits_per_byte: float | None
    is_best: bool


class Trainer:
    """Trains one decoder; `best_params` are the best weights tested, in bfloat16."""

    def __init__(
        self,
        config: ModelConfig,
        plan: TrainingPlan,
        *,
        streams: Sequence[TokenStream],
        held_out: Sequence[TokenStream],
        clock: Clock,
        start_params: Params | None = None,
    ):
        """`start_params`, in float32, go on from an earlier run; without them weights are random.

        The trainer takes them over: the first step donates them.
        """
        decoder = Decoder(config, init=Init(jnp.dtype(jnp.float32), nnx.Rngs(plan.seed)))
        self._graph, state = nnx.split(decoder)
        self._params = nnx.to_pure_dict(state) if start_params is None else start_params
        self.best_params = _stored(self._params)
        self._plan, self._clock = plan, clock
        self._sampler = RowSampler(streams, dialogue_weight=plan.dialogue_weight, seed=plan.seed)
        self._optimiser = make_optimiser(plan.weight_decay)
        self._optimiser_state = self._optimiser.init(self._params)
        self._test_rows = evaluation_rows(held_out, plan.long_row_tokens)
        num_tokens, num_bytes = (
            sum(len(stream.tokens) for stream in held_out),
            sum(stream.num_bytes for stream in held_out),
        )
        self._tokens_per_byte = num_tokens / num_bytes

    def run(self) -> Iterator[StepReport]:
        """Train to the end of the plan, reporting every step."""
        plan, started_s = self._plan, self._clock.now()
        step, progress, num_tests, best = 0, 0.0, 0, math.inf
        while progress < 1.0:
            step_started_s = self._clock.now()
            nats_per_token = self._step(progress)
            now_s, step = self._clock.now(), step + 1
            if plan.steps is not None:
                progress = step / plan.steps
            else:
                assert plan.minutes is not None
                progress = min((now_s - started_s) / (60 * plan.minutes), 1.0)
            bits_per_byte, is_best = None, False
            if progress * plan.num_tests >= num_tests + 1:
                num_tests = int(progress * plan.num_tests)
                stored = _stored(self._params)
                bits_per_byte = self._bits_per_byte(stored, plan.test_rows)
                if is_best := bits_per_byte < best:
                    best, self.best_params = bits_per_byte, stored
            rate = plan.tokens_per_step / max(now_s - step_started_s, 1e-9)
            yield StepReport(step, progress, nats_per_token, rate, bits_per_byte, is_best)

    def evaluate_best(self) -> float:
        """Bits of loss per byte of `best_params` over all that was held out.

        Rows are read without overlap, so a row's first tokens have little to go by, and the
        end-of-turn tokens cost bits while they are no bytes: both count against the model.
        """
        return self._bits_per_byte(self.best_params, len(self._test_rows))

    def _step(self, progress: float) -> float:
        plan = self._plan
        is_long = progress >= 1.0 - plan.long_context_share
        row_tokens = plan.long_row_tokens if is_long else plan.row_tokens
        inputs_BT, targets_BT = self._sampler.rows(plan.tokens_per_step // row_tokens, row_tokens)
        self._params, self._optimiser_state, loss = _train_step(
            self._graph,
            self._optimiser,
            self._params,
            self._optimiser_state,
            inputs_BT,
            targets_BT,
            plan.learning_rate(progress),
        )
        return float(loss)

    def _bits_per_byte(self, stored: Params, num_rows: int) -> float:
        """Over `num_rows` evenly spaced held-out rows, or all where there are fewer."""
        chosen = np.linspace(0, len(self._test_rows) - 1, min(num_rows, len(self._test_rows)))
        params = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
        nats, num_tokens = 0.0, 0.0
        for number in chosen.astype(int):
            inputs_T, targets_T, mask_T = self._test_rows[number]
            losses_BT = _token_losses_jit(self._graph, params, inputs_T[None], targets_T[None])
            nats += float((np.asarray(losses_BT[0]) * mask_T).sum())
            num_tokens += float(mask_T.sum())
        return nats / num_tokens * self._tokens_per_byte / math.log(2)


def _stored(params: Params) -> Params:
    """The weights as they are stored, and tested; copies, since a step donates its inputs."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


@cache
def make_optimiser(weight_decay: float) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for embedding and norms, at learning rate 1.

    The step scales the update by the plan's learning rate, which follows wall time if it must. One
    object per weight decay: it is a static argument of the step, and another would compile again.
    `consistent_rms` makes Muon's updates as large as Adam's, so that both share that rate.
    Source: Jordan 2024 (Muon); Liu et al. 2025 (the scaling).
    """

    def muon_matrices(params: optax.Params) -> Any:
        def matrix(path: tuple[Any, ...], x: Array) -> optax.contrib.MuonDimensionNumbers | None:
            if path[-1].key != "kernel":
                return None
            outputs = tuple(range(1, x.ndim))  # of a projection: [D, *out_shape]
            return optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=outputs)

        return jax.tree_util.tree_map_with_path(matrix, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            1.0,
            weight_decay=weight_decay,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_matrices,
        ),
    )


def _token_losses(graph: Any, params: Params, inputs_BT: Array, targets_BT: Array) -> Array:
    """Nats of each token [B, T]."""
    decoder = nnx.merge(graph, params)
    positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
    attend = causal_attention(decoder.config)
    hidden_BTD, _ = decoder(inputs_BT, positions_BT, attend, None)
    logits_BTV = decoder.logits(hidden_BTD)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


_token_losses_jit = jax.jit(_token_losses, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _train_step(
    graph: Any,
    optimiser: optax.GradientTransformation,
    params: Params,
    optimiser_state: Any,
    inputs_BT: Array,
    targets_BT: Array,
    learning_rate: Array,
) -> tuple[Any, Any, Array]:
    """One update: the new params and optimiser state, and nats per token before it."""
    loss, gradients = jax.value_and_grad(
        lambda params: _token_losses(graph, params, inputs_BT, targets_BT).mean()
    )(params)
    updates, optimiser_state = optimiser.update(gradients, optimiser_state, params)
    updates = jax.tree.map(lambda update: learning_rate * update, updates)
    return optax.apply_updates(params, updates), optimiser_state, loss
