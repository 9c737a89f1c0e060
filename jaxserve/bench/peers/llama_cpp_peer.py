"""llama.cpp as a peer: continuous batching over `llama_decode`, in its best configuration here.

`python -m jaxserve.bench.peers.llama_cpp_peer --model_dir=DIR` prints results in the protocol;
`--tune` instead tries configurations on a shorter workload. The driver does what llama.cpp's own
server does (running rows and new prompts in one call), with less work per token on the host: it
fills batches and picks greedy tokens for all rows at once in numpy.

Dimension key: B rows  R outputs of a call  K candidates  V vocabulary
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from jaxserve.bench.peers.llama_cpp_engine import LlamaConfig, LlamaEngine
from jaxserve.bench.peers.protocol import (
    DECODE_POINTS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    DecodeResult,
    Meter,
    WorkloadResult,
    emit,
    num_cores,
    peer_arguments,
)
from jaxserve.bench.peers.weights import GGUF_NAME
from jaxserve.bench.peers.workload import (
    MAX_ROWS,
    OUTPUT,
    PROMPT,
    Request,
    make_requests,
    warm_up_requests,
)

PEER: Final = "llama.cpp"
ROW_TOKENS: Final = PROMPT.high + OUTPUT.high

Pick = Callable[[np.ndarray], np.ndarray]
"""pick(logits_RV) -> tokens_R."""


def pick_greedy(logits_RV: np.ndarray) -> np.ndarray:
    """The likeliest token of each row."""
    return logits_RV.argmax(axis=1)


def sampled_pick(seed: int) -> Pick:
    """Temperature, top-k, top-p, in the order and with the meaning Hugging Face gives them.

    numpy takes 0.6 ms for 64 rows of 4,096 where one llama.cpp sampler chain per row takes 1.5 ms
    (one AVX-512 core, 2026), so this is llama.cpp at its best.
    """
    rng = np.random.default_rng(seed)

    def pick(logits_RV: np.ndarray) -> np.ndarray:
        top_RK = np.argpartition(logits_RV, -TOP_K, axis=1)[:, -TOP_K:]
        x_RK = np.take_along_axis(logits_RV, top_RK, axis=1)
        order_RK = np.argsort(-x_RK, axis=1)
        x_RK = np.take_along_axis(x_RK, order_RK, axis=1)
        weight_RK = np.exp((x_RK - x_RK[:, :1]) / TEMPERATURE)
        sum_RK = np.cumsum(weight_RK, axis=1)
        # A token stays when those before it have not yet reached top-p: the first always stays.
        num_kept_R = np.sum(sum_RK - weight_RK < TOP_P * sum_RK[:, -1:], axis=1)
        rows = np.arange(len(logits_RV))
        drawn_R = rng.random(len(rows)) * sum_RK[rows, num_kept_R - 1]
        choice_R = np.sum(sum_RK <= drawn_R[:, None], axis=1)
        return top_RK[rows, order_RK[rows, choice_R]]

    return pick


@dataclass(frozen=True, slots=True)
class _Call:
    """Tokens of one llama_decode call: their rows, places and which of them need logits."""

    tokens: np.ndarray
    positions: np.ndarray
    row_ids: np.ndarray
    outputs: np.ndarray

    def __add__(self, other: "_Call") -> "_Call":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Call(*(np.concatenate(pair) for pair in pairs))


class ContinuousBatch:
    """Serves requests first come, first served: a row that ends makes room at the next step."""

    def __init__(self, engine: LlamaEngine, config: LlamaConfig, requests: Sequence[Request]):
        self._engine = engine
        self._config = config
        self._waiting = deque(requests)
        self._last_B = np.zeros(MAX_ROWS, np.int32)
        self._position_B = np.zeros(MAX_ROWS, np.int32)  # where the last token goes
        self._left_B = np.zeros(MAX_ROWS, np.int32)  # tokens still to make; 0 is an idle row

    def run(self, pick: Pick, meter: Meter) -> None:
        """Serves everything; `meter` hears of each step's tokens."""
        self._engine.clear()
        while self._waiting or self._left_B.any():
            running = self._running_call()  # before admission: new rows have no last token yet
            prompts = self._admit(budget=self._config.batch_tokens - len(running.tokens))
            calls = [running + prompts] if self._config.mixed else [prompts, running]
            for call in calls:
                if len(call.tokens):
                    self._step(call, pick, meter)

    def _running_call(self) -> _Call:
        busy_B = self._left_B > 0
        rows = np.flatnonzero(busy_B)
        if self._config.fill_tail and not self._waiting:
            rows = np.arange(rows[-1] + 1)
        return _Call(self._last_B[rows], self._position_B[rows], rows, busy_B[rows])

    def _admit(self, *, budget: int) -> _Call:
        prompts = [_NOTHING]
        for row in np.flatnonzero(self._left_B == 0):
            if not self._waiting or len(self._waiting[0].prompt_ids) > budget:
                break
            request = self._waiting.popleft()
            length = len(request.prompt_ids)
            budget -= length
            self._position_B[row] = length - 1
            self._left_B[row] = request.output_tokens
            positions = np.arange(length)
            prompts.append(
                _Call(
                    np.array(request.prompt_ids),
                    positions,
                    np.full(length, row),
                    positions == length - 1,
                )
            )
        pieces = zip(*(dataclasses.astuple(prompt) for prompt in prompts), strict=True)
        return _Call(*(np.concatenate(piece) for piece in pieces))

    def _step(self, call: _Call, pick: Pick, meter: Meter) -> None:
        logits_RV = self._engine.decode(call.tokens, call.positions, call.row_ids, call.outputs)
        # Filled idle rows move on too, or their next dummy token would sit on the last one.
        self._position_B[np.unique(call.row_ids)] += 1
        if not len(logits_RV):
            return
        rows = call.row_ids[call.outputs]
        self._last_B[rows] = pick(logits_RV)
        self._left_B[rows] -= 1
        meter.add(len(rows))
        for row in rows[self._left_B[rows] == 0]:
            self._engine.forget(int(row))
            self._position_B[row] = 0


_NOTHING: Final = _Call(
    np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.bool_)
)


def run_workload(
    engine: LlamaEngine, config: LlamaConfig, requests: tuple[Request, ...], *, mode: str
) -> WorkloadResult:
    """One run of `requests`, after a short one to warm up."""
    pick = pick_greedy if mode == "greedy" else sampled_pick(seed=0)
    ContinuousBatch(engine, config, warm_up_requests(requests)).run(pick, Meter())
    meter = Meter()
    ContinuousBatch(engine, config, requests).run(pick, meter)
    return meter.result(PEER, mode, config=dataclasses.asdict(config))


def decode_alone(
    engine: LlamaEngine, rows: int, context: int, *, steps: int = 32, repeats: int = 5
) -> float:
    """Tokens per second of `rows` rows whose contexts pass through `context`: best of repeats."""
    rng = np.random.default_rng(0)
    start = context - steps // 2
    engine.clear()
    positions = np.arange(start)
    for row in range(rows):
        prompt = rng.integers(0, engine.vocab_size, start)
        engine.decode(prompt, positions, np.full(start, row), np.zeros(start, np.bool_))
    row_ids, outputs = np.arange(rows), np.ones(rows, np.bool_)
    taken_s = []
    for _ in range(repeats):
        tokens = rng.integers(0, engine.vocab_size, rows)
        began_s = time.perf_counter()
        for step in range(steps):
            logits_RV = engine.decode(tokens, np.full(rows, start + step), row_ids, outputs)
            tokens = pick_greedy(logits_RV)
        taken_s.append(time.perf_counter() - began_s)
        for row in range(rows):
            engine.forget(row, from_position=start)
    return rows * steps / min(taken_s)


def tune(model: Path, requests: tuple[Request, ...], *, mode: str) -> None:
    """Prints each configuration's rate on the first quarter of the requests."""
    base = LlamaConfig()
    changes: tuple[dict[str, bool | int | str], ...] = (
        {},
        {"kv_unified": True},
        {"mixed": False},
        {"fill_tail": False},
        {"flash_attention": not base.flash_attention},
        {"kv_type": "f16"},
        {"ubatch_tokens": 128},
        {"ubatch_tokens": 256},
        {"ubatch_tokens": 1024, "batch_tokens": 4096},
        {"batch_tokens": 1024},
    )
    for change in changes:
        config = dataclasses.replace(base, **change)
        engine = _open(model, config)
        result = run_workload(engine, config, requests[: len(requests) // 4], mode=mode)
        engine.close()
        print(f"{mode} {result.tokens_per_s:8.1f} tokens/s  {change or 'default'}", flush=True)


def _open(model: Path, config: LlamaConfig) -> LlamaEngine:
    return LlamaEngine(model, config, num_rows=MAX_ROWS, row_tokens=ROW_TOKENS, threads=num_cores())


def main() -> None:
    """Measures decode alone, then the workload in each mode."""
    parser = peer_arguments(__doc__ or "")
    parser.add_argument("--tune", action="store_true", help="compare configurations instead")
    options = parser.parse_args()
    model = options.model_dir / GGUF_NAME
    config = LlamaConfig()
    engine = _open(model, config)
    requests = make_requests(engine.vocab_size, count=options.requests, seed=options.seed)
    if options.tune:
        for mode in options.modes:
            tune(model, requests, mode=mode)
        return
    for rows, context in DECODE_POINTS:
        rate = decode_alone(engine, rows, context)
        emit(DecodeResult(peer=PEER, rows=rows, context=context, tokens_per_s=rate))
    for mode in options.modes:
        for _ in range(options.repeats):
            emit(run_workload(engine, config, requests, mode=mode))
    engine.close()


if __name__ == "__main__":
    main()
