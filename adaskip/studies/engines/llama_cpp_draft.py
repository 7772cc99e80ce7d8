"""Times generations of one prompt in llama.cpp through llama-cpp-python, whose interface takes a draft.

The class `Llama` reads the drafted tokens in one step and keeps those that it would have generated itself.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from llama_cpp import Llama, __version__, llama_state_seq_get_size  # pyright: ignore[reportMissingImports]
from llama_cpp.llama_speculative import LlamaDraftModel  # pyright: ignore[reportMissingImports]

from adaskip.studies.engines.worker import Clock

DRAFTED = 3
"""Tokens that are drafted at a time."""


class Draft(LlamaDraftModel):
    """A second model, which drafts the next tokens greedily. calls: how often it did."""

    def __init__(self, llama: Llama):
        self.llama, self.calls = llama, 0

    def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
        """The next tokens after ids [S]; what the model has read of them before is not read again."""
        self.calls += 1
        return np.array([*islice(self.llama.generate(input_ids.tolist(), temp=0), DRAFTED)], dtype=np.intc)


class Times:
    """A GGUF file in llama.cpp with flash attention, K/V in 16 bits.

    Args:
        model: the file. draft: the file of a model that drafts 3 tokens at a time; None for none.
        dtype: ignored; the file has its own. batch_size: 1. prompt_tokens, new_tokens: the most of a generation.
        threads: of the CPU.
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
        if batch_size != 1:
            raise ValueError(f"llama-cpp-python drafts for one prompt at a time, not {batch_size}")
        settings = {"n_ctx": prompt_tokens + new_tokens + DRAFTED, "n_threads": threads, "n_threads_batch": threads}
        settings |= {"flash_attn": True, "verbose": False}
        self.draft = None if draft is None else Draft(Llama(draft, **settings))
        # With a draft, `Llama` takes the logits of every token, for which it has room only if told so here, too.
        self.llama = Llama(model, draft_model=self.draft, logits_all=self.draft is not None, **settings)
        self.further = 0

    def describe(self) -> dict[str, Any]:
        """The version of llama-cpp-python."""
        return {"version": __version__}

    def run(self, ids: list[list[int]], new_tokens: int, now: Clock) -> dict[str, Any]:
        """Generate greedily after a prompt of token ids [1, S]; steps_s: mean time of a further token, in a list."""
        for llama in self._models():
            llama.reset()
        start_s = now()
        tokens = self.llama.generate(ids[0], temp=0)
        next(tokens)
        first_s = now()
        further = len([*islice(tokens, new_tokens - 1)])
        end_s = now()
        assert further == new_tokens - 1
        self.further += further
        return {
            "ttft_s": first_s - start_s,
            "steps_s": [(end_s - first_s) / further],
            "kv_bytes": sum(llama_state_seq_get_size(llama.ctx, 0) for llama in self._models()),
            "peak_memory_bytes": None,
            **self._accepted(),
        }

    def _models(self) -> list[Llama]:
        return [self.llama] if self.draft is None else [self.llama, self.draft.llama]

    def _accepted(self) -> dict[str, int]:
        """Tokens drafted and accepted since the start; empty without a draft. Each step adds a token of the model."""
        if self.draft is None:
            return {}
        return {"drafted": DRAFTED * self.draft.calls, "accepted": self.further - self.draft.calls}
