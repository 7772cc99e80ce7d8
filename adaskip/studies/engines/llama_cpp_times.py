"""Times generations in llama.cpp through its C interface: several sequences in a batch, with flash attention."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from adaskip.studies.engines.worker import Clock

BATCH_TOKENS = 512
"""llama.cpp's default for the tokens of a prompt that are read at once."""


class Times:
    """A GGUF file in llama.cpp, its K/V in 16 bits.

    Args:
        model: the file. draft: must be None. dtype: not minded; the file says it.
        batch_size, prompt_tokens, new_tokens: the most that a generation has. threads: of the CPU.
    """

    def __init__(
        self,
        model: str,
        draft: str | None,
        dtype: str,
        batch_size: int,
        prompt_tokens: int,
        new_tokens: int,
        threads: int,
    ):
        assert draft is None
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch_size * (prompt_tokens + new_tokens)
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = batch_size
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {model}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(BATCH_TOKENS, batch_size), 0, 1)

    def describe(self) -> dict[str, Any]:
        """The version of llama-cpp-python."""
        return {"version": llama_cpp.__version__}

    def run(self, ids: list[list[int]], new_tokens: int, now: Clock) -> dict[str, Any]:
        """Generate greedily after prompts of token ids [B, S]; steps_s: time of each further token of all rows."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        marks = [now()]
        rows = [self._read(row, prompt) for row, prompt in enumerate(ids)]
        marks.append(now())
        for position in range(len(ids[0]), len(ids[0]) + new_tokens - 1):
            self._decode([(token, position, row, True) for row, token in enumerate(rows)])
            rows = [self._best(place) for place in range(len(rows))]
            marks.append(now())
        kv_bytes = sum(llama_cpp.llama_state_seq_get_size(self.context, row) for row in range(len(ids)))
        ttft_s, *steps_s = np.diff(marks).tolist()
        return {"ttft_s": ttft_s, "steps_s": steps_s, "kv_bytes": kv_bytes, "peak_memory_bytes": None}

    def _read(self, row: int, prompt: list[int]) -> int:
        """Fill the cache of a row with its prompt; its first new token."""
        for start in range(0, len(prompt), BATCH_TOKENS):
            part = prompt[start : start + BATCH_TOKENS]
            last = len(prompt) - 1
            self._decode([(token, p, row, p == last) for p, token in enumerate(part, start)])
        return self._best(len(part) - 1)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One forward. tokens: id, position, row, and whether logits are wanted."""
        self.batch.n_tokens = len(tokens)
        for place, (token, position, row, wanted) in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place] = token, position
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, row
            self.batch.logits[place] = wanted
        if code := llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode failed with code {code}")

    def _best(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    """llama.cpp's log, of which nothing is wanted."""
