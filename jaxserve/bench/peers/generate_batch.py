"""transformers' `generate_batch` on a Llama of random weights, made on the device.

`python -m jaxserve.bench.peers.generate_batch --shape=llama3-8b --device=cuda ...` prints a result
in the protocol after each run. Runs in the peers' Python; imports no JAX. All requests are alike,
so that continuous batching wastes no tokens; see transformers_peer.py on how it is called.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any, Final

import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    ContinuousBatchingConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from jaxserve.bench.peers.protocol import Meter, WorkloadResult, emit, first_line
from jaxserve.bench.peers.transformers_peer import generation_config, take_answers
from jaxserve.bench.peers.weights import hf_fields
from jaxserve.bench.peers.workload import Request, equal_requests
from jaxserve.models.config import SHAPES, ModelConfig

PEER: Final = "transformers generate_batch"

_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "as it chooses": {},
    # Without flash attention it attends from a step's queries to the keys of all rows under a
    # mask, so that small steps can be faster than those it chooses.
    "512 tokens a step": {"max_batch_tokens": 512},
}
"""How it is run on a GPU, by name; the best run counts."""

_CPU_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "small": {"page_size": 32, "num_blocks": 64, "max_batch_tokens": 96},
}


def make_model(config: ModelConfig, *, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Random weights on the device. Scaled rotation is left out: it costs a step nothing."""
    plain = replace(config, rope=replace(config.rope, scaling="none"))
    fields = hf_fields(plain, dtype=str(dtype).removeprefix("torch."))
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**fields), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def run(
    model: LlamaForCausalLM, settings: dict[str, Any], workloads: list[tuple[Request, ...]]
) -> list[WorkloadResult]:
    """A result for each workload but the first, which warms up."""
    most = max(request.output_tokens for requests in workloads for request in requests)
    batching = ContinuousBatchingConfig(max_requests_per_batch=len(workloads[0]), **settings)
    results = []
    with model.continuous_batching_context_manager(
        generation_config=generation_config("greedy", max_new_tokens=most),
        continuous_batching_config=batching,
        timeout=5,  # as in generate_batch: a thread that hangs is left behind
    ) as manager:
        for requests in workloads:
            meter = Meter()
            take_answers(manager, requests, meter)
            results.append(meter.result(PEER, "greedy", config=dict(settings)))
    return results[1:]


def main() -> None:
    """Measures every setting, twice after a warm-up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--prompt_tokens", type=int, required=True)
    parser.add_argument("--output_tokens", type=int, required=True)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this Python's torch finds no GPU")
    on_gpu = options.device == "cuda"
    config = SHAPES[options.shape]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = make_model(config, dtype=dtype, device=options.device)
    workloads = [
        equal_requests(
            config.vocab_size,
            count=options.requests,
            prompt_tokens=options.prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
        )
        for seed, output_tokens in enumerate((8, options.output_tokens, options.output_tokens))
    ]
    failed = []
    for name, settings in (_SETTINGS if on_gpu else _CPU_SETTINGS).items():
        try:
            for result in run(model, settings, workloads):
                emit(replace(result, config={"settings": name, **result.config}))
        except Exception as error:  # the other setting may do
            failed.append(f"{name}: {first_line(error)}")
            print(f"generate_batch, {failed[-1]}", flush=True)
    if len(failed) == len(_SETTINGS if on_gpu else _CPU_SETTINGS):
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
