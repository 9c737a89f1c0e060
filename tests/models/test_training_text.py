"""Text to rows: nothing is lost on the way, and every target follows its input."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from jaxserve.errors import ConfigError
from jaxserve.models.training_text import (
    END_OF_TURN,
    END_OF_TURN_ID,
    RowSampler,
    TokenStream,
    encode_turns,
    evaluation_rows,
    hold_out,
    is_dialogue,
    load_tokenizer,
    read_turns,
    split_turns,
    train_tokenizer,
)

PLAY = "ROMEO:\nBut soft!\nWhat light?\n\nJULIET:\nAy me!\n\n\nNURSE:\nMadam!\n"
NOVEL = "It was a dark\nand stormy night.\n\n'Who is\nthere?' said she.\n"
TOKENIZER: Tokenizer = train_tokenizer(split_turns(PLAY) + split_turns(NOVEL), vocab_size=300)


def test_speeches_keep_their_lines_and_prose_is_unwrapped() -> None:
    assert split_turns(PLAY)[0] == "ROMEO:\nBut soft!\nWhat light?"
    assert split_turns(NOVEL) == ["It was a dark and stormy night.", "'Who is there?' said she."]
    assert [is_dialogue(turn) for turn in split_turns(PLAY + "\n" + NOVEL)] == [True] * 3 + [
        False
    ] * 2


def test_a_text_without_blank_lines_is_split_where_sentences_end_short_lines() -> None:
    paragraph = "a line of ordinary length, which is some sixty characters long or\nthe end.\n"
    turns = split_turns(paragraph * 100)
    assert turns == [" ".join(paragraph.split())] * 100


@given(st.text())
def test_every_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_a_tokenizer_comes_back_and_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_str())
    assert load_tokenizer(path).to_str() == TOKENIZER.to_str()
    path.write_text(Tokenizer(models.BPE()).to_str())
    with pytest.raises(ConfigError, match=r"wanted <\|endoftext\|> as token 0"):
        load_tokenizer(path)
    for content in ("{}", "no JSON"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"tokenizer\.json: .*; wanted a tokenizer of an"):
            load_tokenizer(path)


def test_a_stream_holds_every_turn_with_its_end() -> None:
    turns = split_turns(PLAY)
    stream = encode_turns(TOKENIZER, turns)
    text = TOKENIZER.decode(stream.tokens.tolist(), skip_special_tokens=False)
    assert text == "".join(f"{turn}{END_OF_TURN}\n\n" for turn in turns)
    assert stream.num_bytes == len(text.replace(END_OF_TURN, "").encode())
    assert stream.dialogue
    before_starts = TOKENIZER.decode(stream.tokens[stream.turn_starts[1:] - 1].tolist())
    assert before_starts == "\n" * (len(turns) - 1)


@given(st.lists(st.text(min_size=1), min_size=2), st.floats(0.01, 0.5))
def test_held_out_turns_are_the_last_and_both_sides_have_some(
    turns: list[str], share: float
) -> None:
    train, kept = hold_out(turns, share)
    assert train + kept == turns
    assert train and kept


def test_a_text_of_one_paragraph_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="got a text of 1 paragraphs; wanted at least 2"):
        hold_out(["alone"], 0.1)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_text_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt: .*; wanted a UTF-8 text file"):
        read_turns(path)


def test_every_target_follows_its_input_and_every_turn_has_a_target_that_ends_it() -> None:
    stream = encode_turns(TOKENIZER, split_turns(PLAY))
    inputs_BT, targets_BT = RowSampler([stream], dialogue_weight=1.0, seed=0).rows(64, 16)
    assert inputs_BT.shape == targets_BT.shape == (64, 16)
    after = set(zip(stream.tokens, np.roll(stream.tokens, -1), strict=True))
    assert set(zip(inputs_BT.ravel(), targets_BT.ravel(), strict=True)) <= after
    ends_in, ends_out = (inputs_BT == END_OF_TURN_ID).sum(), (targets_BT == END_OF_TURN_ID).sum()
    assert 0.3 * ends_out < ends_in < 0.7 * ends_out


def test_the_same_seed_draws_the_same_rows_and_about_half_start_a_turn() -> None:
    stream = encode_turns(TOKENIZER, split_turns(PLAY))
    first, second = (RowSampler([stream], dialogue_weight=1.0, seed=3).rows(200, 8) for _ in "ab")
    np.testing.assert_array_equal(first, second)
    starts = set(stream.tokens[stream.turn_starts])
    assert 0.4 < np.isin(first[0][:, 0], list(starts)).mean() < 0.75


def test_dialogue_is_drawn_as_often_as_its_weight_says() -> None:
    speech, prose = (
        TokenStream(np.full(100, token, np.int32), np.zeros(1, np.int64), 100, dialogue)
        for token, dialogue in ((1, True), (2, False))
    )
    inputs_BT, _ = RowSampler([speech, prose], dialogue_weight=3.0, seed=0).rows(1000, 4)
    assert abs((inputs_BT == 1).mean() - 0.75) < 0.05


@given(st.integers(1, 40))
def test_evaluation_rows_hold_every_token_once(num_tokens: int) -> None:
    streams = [encode_turns(TOKENIZER, split_turns(text)) for text in (PLAY, NOVEL)]
    rows = evaluation_rows(streams, num_tokens)
    assert all(part.shape == (num_tokens,) for row in rows for part in row)
    targets = np.concatenate([targets[mask == 1] for _, targets, mask in rows])
    inputs = np.concatenate([inputs[mask == 1] for inputs, _, mask in rows])
    np.testing.assert_array_equal(targets, np.concatenate([s.tokens[1:] for s in streams]))
    np.testing.assert_array_equal(inputs, np.concatenate([s.tokens[:-1] for s in streams]))
