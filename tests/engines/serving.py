"""vLLM in the test's own process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from tests.engines.exports import NUM_TOKENS


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """vLLM on a folder, in float32 and without compilation unless told otherwise."""
    settings = {
        **{"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 512},
        **{"distributed_executor_backend": "uni", "seed": 0},
    }
    llm = LLM(model=str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def greedy(llm: LLM, prompts: list[torch.Tensor], num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """Greedy tokens of each prompt [T], all requests at once, ends not minded."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
    return [list(request.outputs[0].token_ids) for request in llm.generate(requests, sampling, use_tqdm=False)]


def kv_tokens(llm: LLM) -> int:
    """For how many tokens there is a place in the KV cache."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size
