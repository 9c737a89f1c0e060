"""llama.cpp's `llama_decode` behind numpy arrays: one context, many sequences, no request logic.

Runs in the peers' Python, which has llama-cpp-python; imports no JAX. Batches are filled by
writing whole arrays into memory that the C struct points at, because a Python loop over 64 rows
costs as much as several layers of this small model.

Dimension key: T tokens in a call  R outputs of a call  V vocabulary
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import llama_cpp  # pyright: ignore[reportMissingImports]  # the peers' venv has it
import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """What can be tuned about a context and about how it is driven.

    `mixed` puts prompts and running rows into one call; else a prompt has a call of its own.
    `fill_tail` lets idle rows decode a dummy token once no request waits: llama.cpp splits a call
    over separate streams wherever sequence ids leave a gap.
    """

    kv_unified: bool = False
    mixed: bool = True
    fill_tail: bool = True
    batch_tokens: int = 2048
    ubatch_tokens: int = 512
    flash_attention: bool = False
    kv_type: str = "f32"


class LlamaEngine:
    """A model loaded from GGUF and one context of `num_rows` sequences of `row_tokens` each."""

    def __init__(
        self, path: Path, config: LlamaConfig, *, num_rows: int, row_tokens: int, threads: int
    ):
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), model_params)
        if self._model is None:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._context = llama_cpp.llama_init_from_model(
            self._model, _context_params(config, num_rows * row_tokens, num_rows, threads)
        )
        if self._context is None:
            raise RuntimeError(f"llama.cpp could not make a context for {config}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._batch_arrays(config.batch_tokens)

    def _batch_arrays(self, size: int) -> None:
        self._tokens_T = np.zeros(size, np.int32)
        self._positions_T = np.zeros(size, np.int32)
        self._row_ids_T = np.zeros(size, np.int32)
        self._outputs_T = np.zeros(size, np.int8)
        self._ones_T = np.ones(size, np.int32)  # sequences per token
        # seq_id is an array of pointers, one per token, each to that token's own row id.
        base = self._row_ids_T.ctypes.data
        self._row_pointers_T = (base + 4 * np.arange(size)).astype(np.uint64)
        self._batch = llama_cpp.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens_T, ctypes.c_int32),
            embd=None,
            pos=_pointer(self._positions_T, ctypes.c_int32),
            n_seq_id=_pointer(self._ones_T, ctypes.c_int32),
            seq_id=_pointer(self._row_pointers_T, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._outputs_T, ctypes.c_int8),
        )

    def decode(
        self,
        tokens_T: np.ndarray,
        positions_T: np.ndarray,
        row_ids_T: np.ndarray,
        outputs_T: np.ndarray,
    ) -> np.ndarray:
        """Runs one call; returns logits_RV of the tokens whose `outputs_T` is set, in their order.

        The result is a view of llama.cpp's buffer, valid until the next call.
        """
        count = len(tokens_T)
        self._tokens_T[:count] = tokens_T
        self._positions_T[:count] = positions_T
        self._row_ids_T[:count] = row_ids_T
        self._outputs_T[:count] = outputs_T
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {count} tokens: got status {status}, wanted 0")
        num_outputs = int(np.count_nonzero(outputs_T))
        if num_outputs == 0:
            return np.empty((0, self.vocab_size), np.float32)
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(num_outputs, self.vocab_size))

    def forget(self, row_id: int, *, from_position: int = 0) -> None:
        """Drops a row's keys and values from a position on."""
        llama_cpp.llama_memory_seq_rm(self._memory, row_id, from_position, -1)

    def clear(self) -> None:
        """Drops all rows."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Frees context and model."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def _context_params(
    config: LlamaConfig, context_tokens: int, num_rows: int, threads: int
) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context_tokens
    params.n_batch = config.batch_tokens
    params.n_ubatch = config.ubatch_tokens
    params.n_seq_max = num_rows
    params.n_threads = threads
    params.n_threads_batch = threads
    params.kv_unified = config.kv_unified
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if config.flash_attention
        else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    kv_type = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[config.kv_type]
    params.type_k = params.type_v = kv_type
    params.no_perf = True
    return params


def _pointer(array: np.ndarray, kind: type) -> "ctypes._Pointer":
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp reports its loading on stderr otherwise; failures come back as status codes."""
