"""Plain text to training rows: turns, a byte-level BPE tokenizer, token streams, sampled rows.

Knows text and numpy; knows no model. A *turn* is what one speaker says, or one paragraph: a block
between blank lines. It ends with END_OF_TURN, so that a model of this text stops by itself.

Dimension key: B rows  T tokens
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxserve.errors import ConfigError

END_OF_TURN: Final = "<|endoftext|>"
END_OF_TURN_ID: Final = 0
BETWEEN_TURNS: Final = "\n\n"

_SPEAKER_LINE = re.compile(r"[^\n]{1,40}:\n")
_LAST_LINE_OF_PARAGRAPH = re.compile(r"(?m)^(.{1,59}[.!?\"'])\n")
_LONGEST_PARAGRAPH = 5000  # characters; a longer block is a text without blank lines


def read_turns(path: Path) -> list[str]:
    """The turns of a UTF-8 text file. Raises ConfigError when it cannot be read as one."""
    try:
        return split_turns(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; wanted a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: got {error.reason}; wanted a UTF-8 text file") from error


def is_dialogue(turn: str) -> bool:
    """Whether the turn opens with a line that names its speaker, such as `ROMEO:`."""
    return _SPEAKER_LINE.match(turn) is not None


def split_turns(text: str) -> list[str]:
    """The blocks between blank lines. Speeches keep their lines (verse); prose is unwrapped.

    Where a text has no blank lines, a short line that ends a sentence ends the paragraph.
    """
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        if len(block) > _LONGEST_PARAGRAPH:
            blocks += _LAST_LINE_OF_PARAGRAPH.sub(r"\1\n\n", block).split("\n\n")
        else:
            blocks.append(block)
    blocks = [block.strip() for block in blocks]
    return [block if is_dialogue(block) else " ".join(block.split()) for block in blocks if block]


def train_tokenizer(turns: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every UTF-8 text has tokens, and END_OF_TURN is one token.

    Source: Sennrich et al. 2016 (BPE) over bytes, as in Radford et al. 2019 (GPT-2).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(turns, trainer)
    assert tokenizer.token_to_id(END_OF_TURN) == END_OF_TURN_ID
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer made by `train_tokenizer`. Raises ConfigError for any other file."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: {reason}; wanted a tokenizer of an earlier run") from error
    if tokenizer.token_to_id(END_OF_TURN) != END_OF_TURN_ID:
        raise ConfigError(f"{path}: wanted {END_OF_TURN} as token {END_OF_TURN_ID}")
    return tokenizer


@dataclass(frozen=True, slots=True)
class TokenStream:
    """One text's turns as one run of tokens: turn, end of turn, blank line, turn, ...

    `turn_starts` are positions in `tokens`; `num_bytes` counts the UTF-8 text with its blank
    lines and without the end-of-turn tokens, so that losses compare across vocabularies.
    """

    tokens: NDArray[np.int32]
    turn_starts: NDArray[np.int64]
    num_bytes: int
    dialogue: bool


def encode_turns(tokenizer: Tokenizer, turns: Sequence[str]) -> TokenStream:
    """The turns in order, as one stream. `turns` is not empty."""
    pieces = [turn + END_OF_TURN + BETWEEN_TURNS for turn in turns]
    ids = [np.asarray(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(pieces)]
    ends = np.cumsum([len(piece) for piece in ids])
    return TokenStream(
        tokens=np.concatenate(ids),
        turn_starts=np.concatenate([[0], ends[:-1]]),
        num_bytes=sum(len((turn + BETWEEN_TURNS).encode()) for turn in turns),
        dialogue=sum(map(is_dialogue, turns)) > len(turns) / 2,
    )


def hold_out(turns: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """The turns to train on and those of the last `share` of the text, kept for evaluation.

    Raises ConfigError for fewer than two turns: each side gets at least one.
    """
    if len(turns) < 2:
        raise ConfigError(f"got a text of {len(turns)} paragraphs; wanted at least 2")
    sizes = np.cumsum([len(turn) for turn in turns])
    cut = int(np.searchsorted(sizes, (1 - share) * sizes[-1]))
    cut = min(max(cut, 1), len(turns) - 1)
    return list(turns[:cut]), list(turns[cut:])


Pairs = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Inputs and targets of one shape."""


class RowSampler:
    """Draws training rows from weighted streams; the same seed draws the same rows.

    Half of the rows start at the start of a turn, as prompts do; the others start anywhere. Half
    of the end-of-turn tokens are left out of the inputs and kept as targets: a transcript that a
    person types has blank lines between turns and no special tokens.
    """

    def __init__(self, streams: Sequence[TokenStream], *, dialogue_weight: float, seed: int):
        weights = [len(s.tokens) * (dialogue_weight if s.dialogue else 1.0) for s in streams]
        self._streams = streams
        self._shares = np.asarray(weights) / sum(weights)
        self._rng = np.random.default_rng(seed)

    def rows(self, num_rows: int, num_tokens: int) -> Pairs:
        """inputs_BT and targets_BT: each target is the token that follows its input."""
        chosen = self._rng.choice(len(self._streams), size=num_rows, p=self._shares)
        pairs = [self._row(self._streams[number], num_tokens) for number in chosen]
        return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])

    def _row(self, stream: TokenStream, num_tokens: int) -> Pairs:
        # At most every second token ends a turn: a window of twice the length fills the row
        # whatever is left out. At the end of a stream it wraps around.
        start = int(self._rng.integers(len(stream.tokens)))
        if self._rng.random() < 0.5:
            turn = np.searchsorted(stream.turn_starts, start, side="right") - 1
            start = int(stream.turn_starts[turn])
        window = stream.tokens.take(range(start, start + 2 * num_tokens + 1), mode="wrap")
        inputs, targets = window[:-1], window[1:]
        keep = (inputs != END_OF_TURN_ID) | (self._rng.random(len(inputs)) < 0.5)
        return inputs[keep][:num_tokens], targets[keep][:num_tokens]


def evaluation_rows(
    streams: Sequence[TokenStream], num_tokens: int
) -> list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]]:
    """Rows (inputs_T, targets_T, mask_T) whose unmasked targets are the streams' tokens, once each.

    Rows do not overlap, the first token of a stream is no target, and its last row is padded.
    """
    rows = []
    for stream in streams:
        for start in range(0, len(stream.tokens) - 1, num_tokens):
            window = stream.tokens[start : start + num_tokens + 1]
            padding = (0, num_tokens + 1 - len(window))
            mask = np.pad(np.ones(len(window) - 1, np.float32), padding)
            window = np.pad(window, padding)
            rows.append((window[:-1], window[1:], mask))
    return rows
