"""The engine's tokens over every kernel: over interpreted Pallas, and over quantised pages.

Few and short requests, because interpreted kernels are slow: prompts cut into chunks, then run
again over the pages that the first run left, two rows beside each other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.bench.equality import Cell, EqualityCheck, Grid
from jaxserve.kernels.kv_pages import init_pages, init_row_pages
from jaxserve.kernels.kv_write import write_kv
from jaxserve.kernels.paged_attention import paged_attention
from jaxserve.models.decoder import Decoder, Init
from jaxserve.models.sources import DEMO_DIRECTORY, load_model_config, load_weights, parse_source

GRID = Grid(
    model="random:tiny",
    num_prompts=2,
    max_tokens=5,
    steps=(2,),
    rows=(2,),
    longest_prompt=40,
    tiles=1,
)
CELL = Cell(steps=2, rows=2, prefix_hit=True, preempted=False, chunked=True)


@pytest.mark.parametrize("kernels", ["xla", "pallas_gpu", "pallas_tpu"])
def test_tokens_equal_a_full_recompute(kernels: str) -> None:
    EqualityCheck(GRID, kernels=kernels).run(CELL)


def test_tensor_parallel_row_pages_give_the_same_tokens() -> None:
    EqualityCheck(GRID, kernels="xla", mesh="tp=2").run(CELL)


@functools.cache
def tokens_over(kernels: str, kv_dtype: str, mesh: str = "tp=1") -> dict[str, list[int]]:
    return EqualityCheck(GRID, kernels=kernels, kv_dtype=kv_dtype, mesh=mesh).tokens(CELL)


def test_quantised_pages_give_the_same_tokens_on_every_backend() -> None:
    """Both read the same stored numbers, and quantise alike wherever a row runs."""
    assert tokens_over("pallas_gpu", "int8") == tokens_over("xla", "int8")


def test_quantised_pages_give_the_same_tokens_under_tensor_parallelism() -> None:
    assert tokens_over("xla", "int8", "tp=2") == tokens_over("xla", "int8")


@pytest.fixture(scope="module")
def demo():
    """The demo model's logits of a real text, with pages of some type: logits(kv_dtype)."""
    source = parse_source("demo")
    config = load_model_config(source)
    weights = load_weights(source, config, dtype="float32", seed=0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, init=Init(jnp.float32))))
    nnx.replace_by_pure_dict(state, weights)
    tokens_T = text_tokens(config.vocab_size)
    page_size, num_tokens = 64, tokens_T.size
    num_pages = -(-num_tokens // page_size)
    at_T = jnp.arange(num_tokens)

    @functools.partial(jax.jit, static_argnums=1)
    def logits(state, kv_dtype):
        decoder = nnx.merge(graphdef, state)
        init = init_pages if kv_dtype == "float32" else init_row_pages
        pages = init(
            num_pages * config.num_layers,
            page_size=page_size,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype,
        )

        def attend(layer, q_THC, k_TKC, v_TKC, pages):
            first = layer * num_pages
            page_T = at_T // page_size + first
            pages = write_kv(pages, k_TKC, v_TKC, page_T, at_T % page_size, backend="xla")
            out_1THC = paged_attention(
                q_THC[None],
                pages,
                jnp.arange(num_pages)[None] + first,
                jnp.array([num_tokens]),
                jnp.array([0]),
                backend="xla",
            )
            return out_1THC[0], pages

        hidden_TD, _ = decoder(jnp.asarray(tokens_T), at_T, attend, pages, loop=False)
        return decoder.logits(hidden_TD)

    return tokens_T, lambda kv_dtype: np.asarray(logits(state, kv_dtype), np.float64)


def text_tokens(vocab_size: int, num_tokens: int = 512) -> np.ndarray:
    """A text that the demo model's tokenizer knows how to write: its own licence and names."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json"))
    text = (DEMO_DIRECTORY.parents[2] / "LICENSE").read_text()
    ids = np.array(tokenizer.encode(text).ids[:num_tokens], np.int32)
    assert ids.size == num_tokens and ids.max() < vocab_size
    return ids


@pytest.mark.parametrize(
    ("kv_dtype", "most_nats", "agree"), [("int8", 0.002, 0.98), ("float8_e4m3fn", 0.01, 0.95)]
)
def test_quantised_pages_hardly_change_what_the_demo_model_says(
    demo, kv_dtype, most_nats, agree
) -> None:
    """Of 512 tokens of text: the mean log-probability, and how often the likeliest is the same."""
    tokens_T, logits = demo
    want_TV, got_TV = logits("float32"), logits(kv_dtype)
    loss = [np.mean(_negative_logprob(x_TV[:-1], tokens_T[1:])) for x_TV in (want_TV, got_TV)]
    same = np.mean(want_TV.argmax(-1) == got_TV.argmax(-1))
    print(f"{kv_dtype}: {loss[0]:.4f} -> {loss[1]:.4f} nats per token, {same:.3f} of tokens agree")
    assert abs(loss[1] - loss[0]) < most_nats
    assert same >= agree


def _negative_logprob(x_TV: np.ndarray, token_T: np.ndarray) -> np.ndarray:
    top_T1 = x_TV.max(-1, keepdims=True)
    norm_T = np.log(np.exp(x_TV - top_T1).sum(-1)) + top_T1[:, 0]
    return norm_T - x_TV[np.arange(token_T.size), token_T]
