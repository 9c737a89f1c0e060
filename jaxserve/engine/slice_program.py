"""The slice program: step 0 runs prompt tiles and one token of every decoding row together, then a
`lax.while_loop` decodes without the host. One program per bucket; its state is donated.

What may change from slice to slice is data: steps, quorum, limits, page tables, sampling. Rows that
are done, out of steps or out of lease are masked: they write no key or value and draw no token, so
a row's tokens depend on its own request only.

Dimension key: B rows  T prompt tokens (NT tiles of Q)  X = T + B tokens of step 0  R slots
S step buffer  H query heads  K kv heads  C channels per head  D width  V vocabulary  P table pages
n stop ids  N likeliest tokens reported
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from jaxserve.engine.batch import DECODE, FIELD, IDLE, START, BatchShape, split
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.plan import Code
from jaxserve.kernels import sampling
from jaxserve.kernels.kv_pages import Pages
from jaxserve.kernels.kv_write import write_kv
from jaxserve.kernels.ragged_attention import Tiles, ragged_attention
from jaxserve.models.decoder import Decoder


class DeviceState(NamedTuple):
    """Everything that outlives a slice on the device; donated to each program and replaced.

    `pages` holds the keys and values of all layers, page p of layer l at l * N + p. Per slot: the
    newest token (its key and value are not in the pages yet), the number of prompt and output
    tokens, whether the row has ended, and the dense sampling extras (`counts_RV`: sampling.py says
    how; `bias_RV`: added to logits).
    """

    pages: Pages
    last_token_R: Array
    length_R: Array
    done_R: Array
    counts_RV: Array
    bias_RV: Array


class SliceOutput(NamedTuple):
    """`packed` int32: tokens [S, B], then counts [B], codes [B], steps run [1]. The rest is read
    by the host only when a row asked for log-probabilities."""

    packed: Array
    logprob_SB: Array
    top_ids_SBN: Array
    top_logprobs_SBN: Array


class _Loop(NamedTuple):
    """What the decode loop carries."""

    step: Array
    pages: Pages
    counts_RV: Array
    token_B: Array
    length_B: Array
    left_B: Array
    code_B: Array
    active_B: Array
    made_B: Array
    tokens_SB: Array
    logprob_SB: Array
    top_ids_SBN: Array
    top_logprobs_SBN: Array


@dataclass(frozen=True)
class SliceProgram:
    """The function of one bucket. `eos_token_ids` stop every row that does not ignore them."""

    decoder_def: nnx.GraphDef
    treedef: Any  # of the weights
    bucket: Bucket
    shape: BatchShape
    eos_token_ids: tuple[int, ...]
    num_layers: int
    window: int | None
    loop_layers: bool
    kernels: str  # a resolved backend: attention, the writing of pages and sampling

    def __call__(
        self, weights: list[Array], state: DeviceState, buffer: Array
    ) -> tuple[DeviceState, SliceOutput]:
        decoder = nnx.merge(self.decoder_def, jax.tree.unflatten(self.treedef, weights))
        rows = _Rows(self, buffer, state)
        loop = rows.first(state)
        if self.bucket.tiles:
            pages, hidden_BD = self._mixed_step(decoder, loop, rows)
            loop = rows.after(decoder.logits(hidden_BD), loop._replace(pages=pages), state)

        def body(loop: _Loop) -> _Loop:
            pages, hidden_BD = self._decode_step(decoder, loop, rows)
            return rows.after(decoder.logits(hidden_BD), loop._replace(pages=pages), state)

        loop = lax.while_loop(rows.goes_on, body, loop)
        return rows.state_after(loop, state), rows.output(loop)

    def _decode_step(self, decoder: Decoder, loop: _Loop, rows: "_Rows") -> tuple[Pages, Array]:
        position_B = loop.length_B - 1
        write_at = rows.places(rows.row_B, position_B)
        length_B = jnp.where(loop.active_B, loop.length_B, 0)

        def attend(
            layer: Array | int, q_BHC: Array, k_BKC: Array, v_BKC: Array, pages: Pages
        ) -> tuple[Array, Pages]:
            pages = rows.write(pages, layer, k_BKC, v_BKC, write_at, loop.active_B)
            out_BHC = self._attend(q_BHC, pages, rows, layer, rows.no_tiles, length_B)
            return out_BHC, pages

        hidden_BD, pages = decoder(
            loop.token_B, position_B, attend, loop.pages, loop=self.loop_layers
        )
        return pages, hidden_BD

    def _mixed_step(self, decoder: Decoder, loop: _Loop, rows: "_Rows") -> tuple[Pages, Array]:
        token_X = jnp.concatenate([rows.tokens_T, loop.token_B])
        position_X = jnp.concatenate([rows.position_T, loop.length_B - 1])
        decoding_B = loop.active_B & (rows.kind_B == DECODE)
        write_at = rows.places(jnp.concatenate([rows.row_T, rows.row_B]), position_X)
        valid_X = jnp.concatenate([rows.valid_T, decoding_B])
        length_B = jnp.where(decoding_B, loop.length_B, 0)

        def attend(
            layer: Array | int, q_XHC: Array, k_XKC: Array, v_XKC: Array, pages: Pages
        ) -> tuple[Array, Pages]:
            pages = rows.write(pages, layer, k_XKC, v_XKC, write_at, valid_X)
            return self._attend(q_XHC, pages, rows, layer, rows.tiles, length_B), pages

        hidden_XD, pages = decoder(token_X, position_X, attend, loop.pages, loop=self.loop_layers)
        return pages, hidden_XD[rows.sample_from_B]

    def _attend(
        self,
        q_XHC: Array,
        pages: Pages,
        rows: "_Rows",
        layer: Array | int,
        tiles: Tiles,
        length_B: Array,
    ) -> Array:
        """Prompt tiles, then one query per row, its newest token, over the `length_B` keys it has.

        Every family served here has the scale 1 / sqrt(C) and no soft cap.
        """
        attend = ragged_attention if self.loop_layers else _attention
        return attend(
            q_XHC,
            pages,
            rows.table_BP,
            tiles,
            length_B,
            window=self.window,
            first_page=layer * rows.layer_pages,
            backend=self.kernels,
        )


class _Rows:
    """The unpacked plan, and what each row does after a model step."""

    def __init__(self, program: SliceProgram, buffer: Array, state: DeviceState):
        bucket, shape = program.bucket, program.shape
        header, record, stop, table, tiles, tokens = split(buffer, bucket, shape)
        self.program, self.state = program, state
        self.layer_pages = state.pages.num_pages // program.num_layers
        self.steps, self.quorum = header[0], header[1]
        self.any_extras, self.want_logprobs = header[2] > 0, header[3] > 0
        self.table_BP = table
        self.row_B = jnp.arange(bucket.rows)
        self.slot_B, self.kind_B = _ints(record, "slot"), _ints(record, "kind")
        self.steps_B, self.cover_B = _ints(record, "steps"), _ints(record, "cover")
        self.sample_from_B = _ints(record, "sample_from")
        self.start_length_B = _ints(record, "length")
        self.prompt_length_B = _ints(record, "prompt_length")
        self.max_length_B = _ints(record, "max_length")
        self.params = sampling.RowParams(
            temperature_B=_floats(record, "temperature"),
            top_k_B=_ints(record, "top_k"),
            top_p_B=_floats(record, "top_p"),
            min_p_B=_floats(record, "min_p"),
            repetition_B=_floats(record, "repetition"),
            presence_B=_floats(record, "presence"),
            frequency_B=_floats(record, "frequency"),
            seed_B=lax.bitcast_convert_type(_ints(record, "seed"), jnp.uint32),
            min_tokens_B=_ints(record, "min_tokens"),
            ignore_eos_B=_ints(record, "ignore_eos") > 0,
            stop_ids_BE=stop,
        )
        self.eos_ids = jnp.array(program.eos_token_ids, jnp.int32)
        self._read_tiles(tiles, tokens)

    def _read_tiles(self, tiles: Array, tokens: Array) -> None:
        self.tiles = Tiles(tiles[:, 0], tiles[:, 1], tiles[:, 2])
        self.no_tiles = Tiles(*(column_N[:0] for column_N in self.tiles))
        lane_1Q = jnp.arange(tokens.shape[1])[None, :]
        self.tokens_T = tokens.reshape(-1)
        self.row_T = jnp.repeat(self.tiles.row_N, tokens.shape[1])
        self.position_T = (self.tiles.start_N[:, None] + lane_1Q).reshape(-1)
        self.valid_T = (lane_1Q < self.tiles.valid_N[:, None]).reshape(-1)

    def places(self, row_X: Array, position_X: Array) -> tuple[Array, Array]:
        """Page (of a layer) and slot of each token."""
        page_size = self.state.pages.page_size
        column_X = jnp.minimum(position_X // page_size, self.table_BP.shape[1] - 1)
        return self.table_BP[row_X, column_X], position_X % page_size

    def write(
        self,
        pages: Pages,
        layer: Array | int,
        k_XKC: Array,
        v_XKC: Array,
        places: tuple[Array, Array],
        valid_X: Array,
    ) -> Pages:
        """Store a layer's keys and values; invalid tokens get a page past the pool: dropped."""
        page_X = jnp.where(valid_X, places[0] + layer * self.layer_pages, pages.num_pages)
        return write_kv(pages, k_XKC, v_XKC, page_X, places[1], backend=self.program.kernels)

    def first(self, state: DeviceState) -> _Loop:
        """Rows as the slice finds them: from device state, or from the plan if they start."""
        starts_B, decodes_B = self.kind_B == START, self.kind_B == DECODE
        take: dict[str, Any] = {"mode": "clip"}
        length_B = jnp.where(
            starts_B, self.start_length_B, state.length_R.at[self.slot_B].get(**take)
        )
        ended_B = state.done_R.at[self.slot_B].get(**take) & ~starts_B
        B, S, N = len(self.slot_B), self.program.shape.step_buffer, sampling.N_TOP
        active_B = (starts_B | decodes_B) & ~ended_B & (self.steps_B > 0)
        return _Loop(
            step=jnp.int32(0),
            pages=state.pages,
            counts_RV=state.counts_RV,
            token_B=state.last_token_R.at[self.slot_B].get(**take),
            length_B=length_B,
            left_B=self.steps_B,
            code_B=jnp.full(B, Code.RUNNING, jnp.int32),
            active_B=active_B & (length_B <= self.cover_B),
            made_B=jnp.zeros(B, jnp.int32),
            tokens_SB=jnp.zeros((S, B), jnp.int32),
            logprob_SB=jnp.zeros((S, B), jnp.float32),
            top_ids_SBN=jnp.zeros((S, B, N), jnp.int32),
            top_logprobs_SBN=jnp.zeros((S, B, N), jnp.float32),
        )

    def goes_on(self, loop: _Loop) -> Array:
        ended = jnp.sum(loop.code_B != Code.RUNNING)
        return (loop.step < self.steps) & jnp.any(loop.active_B) & (ended < self.quorum)

    def after(self, raw_BV: Array, loop: _Loop, state: DeviceState) -> _Loop:
        """Draw a token for each active row from its logits, and see whether the row goes on."""
        active_B, output_B = loop.active_B, loop.length_B - self.prompt_length_B
        one_B = active_B.astype(jnp.int32)
        drawn_B, finite_B = self._sample(raw_BV, loop, state, output_B)
        logprobs = _token_logprobs(raw_BV, drawn_B, self.want_logprobs)
        stops_B = sampling.is_stop(drawn_B, self.params, self.eos_ids)
        length_B = loop.length_B + one_B
        code_B = jnp.select(
            [~finite_B, stops_B, length_B >= self.max_length_B],
            [jnp.int32(Code.ERROR), jnp.int32(Code.STOP), jnp.int32(Code.LENGTH)],
            jnp.int32(Code.RUNNING),
        )
        code_B = jnp.where(active_B, code_B, loop.code_B)
        left_B = loop.left_B - one_B
        goes_on_B = (code_B == Code.RUNNING) & (left_B > 0) & (length_B <= self.cover_B)
        kept_B = active_B & finite_B
        place = (loop.step, 0)
        return loop._replace(
            step=loop.step + 1,
            counts_RV=sampling.count_tokens(
                loop.counts_RV, self.slot_B, drawn_B, active_B & self.any_extras
            ),
            token_B=jnp.where(active_B, drawn_B, loop.token_B),
            length_B=length_B,
            left_B=left_B,
            code_B=code_B,
            active_B=active_B & goes_on_B,
            made_B=loop.made_B + kept_B.astype(jnp.int32),
            tokens_SB=lax.dynamic_update_slice(loop.tokens_SB, drawn_B[None], place),
            logprob_SB=lax.dynamic_update_slice(loop.logprob_SB, logprobs[0][None], place),
            top_ids_SBN=lax.dynamic_update_slice(loop.top_ids_SBN, logprobs[1][None], (*place, 0)),
            top_logprobs_SBN=lax.dynamic_update_slice(
                loop.top_logprobs_SBN, logprobs[2][None], (*place, 0)
            ),
        )

    def _sample(
        self, raw_BV: Array, loop: _Loop, state: DeviceState, output_B: Array
    ) -> tuple[Array, Array]:
        """Each row's token and whether its logits were finite.

        Where no row changes its logits they are read as they are: a branch that handed them on
        would copy them.
        """

        def sample(x_BV: Array) -> tuple[Array, Array]:
            return _sample(
                x_BV, self.params, loop.length_B, loop.active_B, backend=self.program.kernels
            )

        def changed() -> Array:
            x_BV = lax.cond(
                self.any_extras,
                lambda: sampling.apply_extras(
                    raw_BV,
                    loop.counts_RV.at[self.slot_B].get(mode="clip"),
                    state.bias_RV.at[self.slot_B].get(mode="clip"),
                    self.params,
                ),
                lambda: raw_BV,
            )
            return sampling.ban_stop_ids(x_BV, output_B, self.params, self.eos_ids)

        changes = self.any_extras | jnp.any(sampling.bans(output_B, self.params))
        return lax.cond(changes, lambda: sample(changed()), lambda: sample(raw_BV))

    def state_after(self, loop: _Loop, state: DeviceState) -> DeviceState:
        R = state.length_R.size
        slot_B = jnp.where(self.kind_B == IDLE, R, self.slot_B)
        ended_B = (loop.code_B != Code.RUNNING) | (
            state.done_R.at[self.slot_B].get(mode="clip") & (self.kind_B == DECODE)
        )
        return state._replace(
            pages=loop.pages,
            last_token_R=state.last_token_R.at[slot_B].set(loop.token_B, mode="drop"),
            length_R=state.length_R.at[slot_B].set(loop.length_B, mode="drop"),
            done_R=state.done_R.at[slot_B].set(ended_B, mode="drop"),
            counts_RV=loop.counts_RV,
        )

    def output(self, loop: _Loop) -> SliceOutput:
        packed = jnp.concatenate(
            [loop.tokens_SB.reshape(-1), loop.made_B, loop.code_B, loop.step[None]]
        )
        return SliceOutput(packed, loop.logprob_SB, loop.top_ids_SBN, loop.top_logprobs_SBN)


# Jitted so that programs, the two places of a mixed one, and layers that are unrolled share their
# traces.
_sample = jax.jit(sampling.sample, static_argnames="backend")
_token_logprobs = jax.jit(sampling.token_logprobs)
_attention = jax.jit(ragged_attention, static_argnames=("window", "backend"))


def _ints(record: Array, name: str) -> Array:
    return record[:, FIELD[name]]


def _floats(record: Array, name: str) -> Array:
    return lax.bitcast_convert_type(_ints(record, name), jnp.float32)
