"""One model's tokenizer: text to ids and back. Wraps Hugging Face `tokenizers`; loads no JAX."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers
from tokenizers import decoders

from jaxserve.errors import ConfigError
from jaxserve.server.detokenize import (
    CONTEXT_TOKENS,
    ByteDetokenizer,
    Detokenizer,
    WindowDetokenizer,
)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: every byte as a printable character.

    Bytes that print stand for themselves, the others follow from U+0100 in their order.
    Source: `bytes_to_unicode` of openai/gpt-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF_CHARACTER: Final = _byte_of_character()


class Tokenizer:
    """Encodes prompts and decodes answers of one model. Methods may be called from any thread."""

    def __init__(self, backend: tokenizers.Tokenizer):
        # Files may ask for padding or truncation, which belongs to training, not to serving.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        special = backend.get_added_tokens_decoder().items()
        self._special_ids = frozenset(id for id, token in special if token.special)
        byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._bytes_of = self._byte_table() if byte_level else None
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises ConfigError when the file is missing or damaged."""
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise ConfigError(
                f"tokenizer {path}: {error}; try another --model or fetch the file again"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """The ids of `text`, int32 [T]."""
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with U+FFFD where their bytes are no UTF-8."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A fresh incremental decoder for an answer to `prompt`; special tokens are silent."""
        if self._bytes_of is not None:
            return ByteDetokenizer(self._bytes_of)
        return WindowDetokenizer(self.decode, prompt[-CONTEXT_TOKENS:])

    def token_bytes(self, token: int) -> bytes | None:
        """What a token stands for; None for special ones and where pieces are not bytes."""
        return None if self._bytes_of is None else self._bytes_of.get(token)

    def _token_text(self, token: int) -> str:
        """One token by itself, special tokens shown."""
        if self._bytes_of is not None and token in self._bytes_of:
            return self._bytes_of[token].decode("utf-8", "replace")
        return self._backend.decode([token], skip_special_tokens=False)

    def _byte_table(self) -> dict[int, bytes]:
        return {
            id: _token_bytes(token)
            for token, id in self._backend.get_vocab(with_added_tokens=True).items()
            if id not in self._special_ids
        }


def _token_bytes(token: str) -> bytes:
    """What the ByteLevel decoder makes of `token`: added tokens may lie outside the alphabet."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()
