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
from jaxserve.bench.kernel_check import INTERPRETED
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


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What a full recompute says, which knows no kernel."""
    return []


@pytest.mark.parametrize(
    ("kernels", "mesh"),
    [
        pytest.param("xla", "tp=2", marks=pytest.mark.full),
        ("pallas_gpu", "tp=1"),
        ("pallas_tpu", "tp=1"),
    ],
)
def test_tokens_equal_a_full_recompute(expected: list, kernels: str, mesh: str) -> None:
    check = EqualityCheck(GRID, kernels=kernels, mesh=mesh, options=INTERPRETED)
    if expected:  # the same weights and requests, whatever the kernels
        check.expected = expected
    assert check.run(CELL) == GRID.num_prompts * GRID.max_tokens
    expected[:] = check.expected


@pytest.mark.full
def test_quantised_pages_give_the_same_tokens_on_every_backend() -> None:
    """Both read the same stored numbers, and quantise alike, on one device or two."""
    one = EqualityCheck(GRID, kernels="pallas_gpu", kv_dtype="int8")
    two = EqualityCheck(GRID, kernels="xla", kv_dtype="int8", mesh="tp=2")
    assert one.tokens(CELL) == two.tokens(CELL)


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


HAMLET = """HAMLET:
To be, or not to be: that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles,
And by opposing end them? To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to, 'tis a consummation
Devoutly to be wish'd. To die, to sleep;
To sleep: perchance to dream: ay, there's the rub;
For in that sleep of death what dreams may come
When we have shuffled off this mortal coil,
Must give us pause: there's the respect
That makes calamity of so long life;
For who would bear the whips and scorns of time,
The oppressor's wrong, the proud man's contumely,
The pangs of despised love, the law's delay,
The insolence of office and the spurns
That patient merit of the unworthy takes,
When he himself might his quietus make
With a bare bodkin? who would fardels bear,
To grunt and sweat under a weary life,
But that the dread of something after death,
The undiscover'd country from whose bourn
No traveller returns, puzzles the will
And makes us rather bear those ills we have
Than fly to others that we know not of?
"""


def text_tokens(vocab_size: int) -> np.ndarray:
    """A text of the kind that the demo model knows best."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json"))
    ids = np.array(tokenizer.encode(HAMLET).ids, np.int32)
    assert ids.size > 300 and ids.max() < vocab_size
    return ids


@pytest.mark.parametrize(
    ("kv_dtype", "most_nats", "agree"), [("int8", 0.005, 0.97), ("float8_e4m3fn", 0.015, 0.93)]
)
def test_quantised_pages_hardly_change_what_the_demo_model_says(
    demo, kv_dtype, most_nats, agree
) -> None:
    """The mean log-probability of a text, and how often the likeliest token is the same."""
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
