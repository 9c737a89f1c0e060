import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from jaxserve.server.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer
from jaxserve.server.tokenizer import Tokenizer


def slices(ids, cuts):
    """`ids` in pieces as long as `cuts` says."""
    start = 0
    for cut in cuts:
        yield ids[start : start + cut]
        start += cut
    yield ids[start:]


def whole(detokenizer: Detokenizer, pieces) -> str:
    return "".join([detokenizer.feed(piece) for piece in pieces]) + detokenizer.flush()


ID_LISTS = st.lists(st.integers(0, 330), max_size=40)
CUTS = st.lists(st.integers(0, 5), max_size=12)


@given(ids=ID_LISTS, cuts=CUTS)
@settings(deadline=None)
def test_any_slices_of_byte_level_tokens_give_the_text_of_the_whole(tokenizer, ids, cuts):
    # Random bytes, special ids, and ids the tokenizer does not have.
    detokenizer = tokenizer.detokenizer([])
    assert isinstance(detokenizer, ByteDetokenizer)
    assert whole(detokenizer, slices(ids, cuts)) == tokenizer.decode(ids)


@given(text=st.text(max_size=30), cuts=CUTS)
@settings(deadline=None)
def test_text_survives_encoding_and_slicing(tokenizer, text, cuts):
    ids = tokenizer.encode(text).tolist()
    assert whole(tokenizer.detokenizer([]), slices(ids, cuts)) == text


def test_half_a_character_waits_for_its_other_half(tokenizer):
    first, *rest = tokenizer.encode("🙃").tolist()
    detokenizer = tokenizer.detokenizer([])
    assert rest and detokenizer.feed([first]) == ""
    assert detokenizer.feed(rest) == "🙃"
    assert detokenizer.feed([first]) == "" and detokenizer.flush() == "\ufffd"


def test_tokens_fed_again_from_a_saved_state_give_the_same_text(tokenizer):
    ids = tokenizer.encode("wörst 🙂 of times").tolist()
    for detokenizer in (tokenizer.detokenizer([]), WindowDetokenizer(tokenizer.decode)):
        detokenizer.feed(ids[:3])
        state = detokenizer.save()
        once = detokenizer.feed(ids[3:])
        detokenizer.restore(state)
        assert "".join(detokenizer.feed([token]) for token in ids[3:]) == once


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """A SentencePiece-like vocabulary: words with a lower one eighth block, and 256 byte tokens."""
    words = ["▁the", "▁times", "▁", "worst", "é", "s", ","]
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


CHARACTERS = st.sampled_from("aé你🙂")
PIECES = st.lists(
    st.one_of(
        st.integers(258, 264).map(lambda word: [word]),
        CHARACTERS.map(lambda character: [2 + byte for byte in character.encode()]),
    ),
    max_size=12,
).map(lambda pieces: [id for piece in pieces for id in piece])


@given(ids=PIECES, cuts=CUTS)
@settings(deadline=None)
def test_any_slices_of_byte_fallback_tokens_give_the_text_of_the_whole(byte_fallback, ids, cuts):
    detokenizer = byte_fallback.detokenizer([])
    assert isinstance(detokenizer, WindowDetokenizer)
    assert whole(detokenizer, slices(ids, cuts)) == byte_fallback.decode(ids)


@given(ids=st.lists(st.integers(0, 264), max_size=30), cuts=CUTS)
@settings(deadline=None)
def test_no_byte_soup_makes_a_window_raise_or_end_early(byte_fallback, ids, cuts):
    pieces = list(slices(ids, cuts))
    detokenizer = byte_fallback.detokenizer([])
    given_out = [detokenizer.feed(piece) for piece in pieces]
    assert not any(text.endswith("\ufffd") for text in given_out)
    detokenizer.flush()
    assert detokenizer.flush() == ""


def test_a_first_word_keeps_its_blank_after_a_prompt(byte_fallback):
    the, times = 258, 259
    assert byte_fallback.decode([times]) == "times"
    assert byte_fallback.detokenizer([the]).feed([times]) == " times"


def test_a_window_stays_short(byte_fallback):
    detokenizer = byte_fallback.detokenizer([])
    for _ in range(50):
        detokenizer.feed([259, 262])
    assert len(detokenizer.save()[0]) <= 5
