"""What a pool holds."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.models.config import ModelConfig
from jaxserve.schedulers.estimators.memory import KvMemory

LLAMA2_13B = ModelConfig(
    name="llama2-13b",
    num_layers=40,
    width=5120,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    mlp_width=13824,
    vocab_size=32000,
    max_context=4096,
)


def test_a_pool_is_counted_to_the_byte() -> None:
    delta = LLAMA2_13B.kv_bytes_per_token(2)
    assert delta == 819_200
    pool = KvMemory.within(2**30, 0.5, page_size=16, bytes_per_token=delta)
    assert pool.page_bytes == 16 * delta
    assert (pool.num_pages, pool.num_tokens) == (40, 640)
    assert KvMemory.within(pool.page_bytes, 1.0, page_size=16, bytes_per_token=delta).num_pages == 1
    assert KvMemory.within(pool.page_bytes - 1, 1.0, page_size=16, bytes_per_token=delta) == (
        KvMemory(0, 16, delta)
    )


def test_the_two_forms_of_the_rule() -> None:
    pool = KvMemory(num_pages=8, page_size=4, bytes_per_token=1)  # 32 tokens
    assert pool.fits_unpaged(3, 5, 5) and not pool.fits_unpaged(3, 6, 5)
    assert pool.fits(2, 12, 4) and not pool.fits(2, 12, 5)
    assert pool.fits_unpaged(2, 11, 5) and pool.fits(2, 11, 5)
    assert not pool.fits(3, 5, 5)  # 3 pages each: the last of them partly empty


@given(
    rows=st.integers(1, 20),
    length=st.integers(1, 100),
    steps=st.integers(1, 40),
    num_pages=st.integers(1, 200),
    page_size=st.sampled_from([1, 8, 16]),
)
def test_what_does_not_fit_fits_with_nothing_more(rows, length, steps, num_pages, page_size):
    pool = KvMemory(num_pages, page_size, 1)
    more = [(rows + 1, length, steps), (rows, length + 1, steps), (rows, length, steps + 1)]
    for form in (pool.fits, pool.fits_unpaged):
        assert form(rows, length, steps) or not any(form(*case) for case in more)
    assert pool.fits_unpaged(rows, length, steps) or not pool.fits(rows, length, steps)
