"""Hugging Face transformers as two peers: `generate` in static batches, and continuous batching.

`python -m jaxserve.bench.peers.transformers_peer --batching=static --model_dir=DIR` prints results
in the protocol. Runs in the peers' Python; imports no JAX.

Continuous batching goes through `continuous_batching_context_manager`, which is what
`generate_batch` itself opens: `generate_batch` passes one `max_new_tokens` to all requests, while
the manager takes each request's own. Its numbers are therefore `generate_batch` without wasted
tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch  # pyright: ignore[reportMissingImports]  # the peers' venv has it
from transformers import (  # pyright: ignore[reportMissingImports]  # and this
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
)

from jaxserve.bench.peers.protocol import (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Meter,
    WorkloadResult,
    emit,
    num_cores,
    peer_arguments,
)
from jaxserve.bench.peers.workload import (
    MAX_ROWS,
    OUTPUT,
    PROMPT,
    Request,
    make_requests,
    warm_up_requests,
)

STATIC_ROWS: Final = 16
PAGE_TOKENS: Final = 32
BATCH_TOKENS: Final = 96
"""Query tokens per continuous step; best of 96, 128, 256 and 512 here. See `serve_continuous`."""


def generation_config(mode: str, *, max_new_tokens: int) -> GenerationConfig:
    """Greedy or sampled, never ending early: there is no end-of-sequence token."""
    sampling: dict[str, Any] = {"do_sample": False}
    if mode == "sampled":
        sampling = {
            "do_sample": True,
            "temperature": TEMPERATURE,
            "top_k": TOP_K,
            "top_p": TOP_P,
        }
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=None, pad_token_id=0, **sampling
    )


class _UsefulTokens(StoppingCriteria):
    """Counts, step by step, the rows that still wanted a token. It never stops anything."""

    def __init__(self, batch: Sequence[Request], meter: Meter):
        self._lengths = torch.tensor([request.output_tokens for request in batch])
        self._meter = meter
        self._step = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._meter.add(int((self._lengths > self._step).sum()))
        self._step += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


def serve_static(
    model: LlamaForCausalLM, requests: Sequence[Request], *, mode: str, meter: Meter
) -> None:
    """Left-padded batches in arrival order, each run to its longest output."""
    for first in range(0, len(requests), STATIC_ROWS):
        batch = requests[first : first + STATIC_ROWS]
        width = max(len(request.prompt_ids) for request in batch)
        pads = [width - len(request.prompt_ids) for request in batch]
        input_ids = [[0] * pad + list(r.prompt_ids) for pad, r in zip(pads, batch, strict=True)]
        attention_mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        longest = max(request.output_tokens for request in batch)
        model.generate(
            torch.tensor(input_ids),
            attention_mask=torch.tensor(attention_mask),
            generation_config=generation_config(mode, max_new_tokens=longest),
            stopping_criteria=[_UsefulTokens(batch, meter)],
        )


def serve_continuous(
    model: LlamaForCausalLM, requests: Sequence[Request], *, mode: str, meter: Meter
) -> None:
    """At most MAX_ROWS rows at a time, each request with its own output length.

    Attention is dense over all keys of the batch under a block mask, so its cost grows with query
    tokens x key tokens of *all* rows: small steps keep prompts from paying for each other's keys.
    Prefix sharing is off, since random prompts share nothing.
    """
    pages = MAX_ROWS * (PROMPT.high + OUTPUT.high) // PAGE_TOKENS
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=pages,
        max_batch_tokens=BATCH_TOKENS,
        max_requests_per_batch=MAX_ROWS,
        allow_block_sharing=False,
    )
    with model.continuous_batching_context_manager(
        generation_config=generation_config(mode, max_new_tokens=OUTPUT.high),
        continuous_batching_config=config,
    ) as manager:
        take_answers(manager, requests, meter)


def take_answers(manager: Any, requests: Sequence[Request], meter: Meter) -> None:
    """Hands all requests to a continuous batching manager, and waits for their last tokens.

    Raises RuntimeError when one fails, or none ends for a minute.
    """
    for request in requests:
        manager.add_request(
            list(request.prompt_ids),
            max_new_tokens=request.output_tokens,
            record_timestamps=True,
        )
    for _ in requests:
        answer = manager.get_result(timeout=60)
        if answer is None or answer.error is not None:
            raise RuntimeError(f"continuous batching failed: {answer and answer.error}")
        for token_s in answer.timestamps:
            meter.add(1, at_s=token_s)


Serve = Callable[..., None]
_SERVE: Final[dict[str, tuple[Serve, dict[str, Any]]]] = {
    "static": (serve_static, {"rows": STATIC_ROWS}),
    "continuous": (
        serve_continuous,
        {"rows": MAX_ROWS, "batch_tokens": BATCH_TOKENS, "page_tokens": PAGE_TOKENS},
    ),
}


def run_workload(
    model: LlamaForCausalLM, batching: str, requests: tuple[Request, ...], *, mode: str
) -> WorkloadResult:
    """One run of `requests`, after a short one to warm up."""
    serve, config = _SERVE[batching]
    serve(model, warm_up_requests(requests), mode=mode, meter=Meter())
    meter = Meter()
    serve(model, requests, mode=mode, meter=meter)
    return meter.result(f"transformers {batching}", mode, config=config)


def main() -> None:
    """Measures the workload in each mode."""
    parser = peer_arguments(__doc__ or "")
    parser.add_argument("--batching", choices=tuple(_SERVE), required=True)
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    model = LlamaForCausalLM.from_pretrained(
        options.model_dir, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    requests = make_requests(model.config.vocab_size, count=options.requests, seed=options.seed)
    for mode in options.modes:
        for _ in range(options.repeats):
            emit(run_workload(model, options.batching, requests, mode=mode))


if __name__ == "__main__":
    main()
