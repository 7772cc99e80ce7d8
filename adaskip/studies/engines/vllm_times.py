"""Times generations in vLLM, whose engine runs in this very process."""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams, __version__  # pyright: ignore[reportMissingImports]

from adaskip.studies.engines.worker import Clock

GIBIBYTE = 2**30


class Times:
    """A model in vLLM, with 1 GiB of K/V on a CPU, without prefix caching.

    Args:
        model: a folder. draft: a folder whose model drafts 3 tokens at a time; None for none.
        dtype: of weights and K/V. batch_size, prompt_tokens, new_tokens: the most that a generation has; whole
            batches of prompts are read in one step.
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
        drafting = {"model": draft, "method": "draft_model", "num_speculative_tokens": 3}
        self.llm = LLM(
            model=model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=prompt_tokens + new_tokens,
            max_num_seqs=batch_size,
            max_num_batched_tokens=batch_size * prompt_tokens,
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
            disable_log_stats=draft is None,
            speculative_config=None if draft is None else drafting,
        )
        self.count = 0

    def describe(self) -> dict[str, Any]:
        """Version, and for how many tokens the K/V cache has room."""
        return {"version": __version__, "kv_capacity_tokens": self._capacity()}

    def run(self, ids: list[list[int]], new_tokens: int, now: Clock) -> dict[str, Any]:
        """Generate greedily after prompts of token ids [B, S].

        ttft_s: until every prompt has its first token. steps_s: the mean time of a further token, in a list.
        """
        engine, self.count = self.llm.llm_engine, self.count + 1
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start_s, first_s = now(), None
        for row, prompt in enumerate(ids):
            engine.add_request(f"{self.count}-{row}", {"prompt_token_ids": prompt}, sampling)
        begun: dict[str, int] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                begun[output.request_id] = len(output.outputs[0].token_ids)
            if first_s is None and len(begun) == len(ids):
                first_s = now()
        end_s = now()
        assert first_s is not None
        assert set(begun.values()) == {new_tokens}, f"{begun} tokens were made, not {new_tokens}"
        length = len(ids) * (len(ids[0]) + new_tokens)
        return {
            "ttft_s": first_s - start_s,
            "steps_s": [(end_s - first_s) / (new_tokens - 1)],
            "kv_bytes": round(GIBIBYTE * length / self._capacity()),
            "peak_memory_bytes": None,
            **self._accepted(),
        }

    def _capacity(self) -> int:
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def _accepted(self) -> dict[str, float]:
        """Tokens drafted and accepted since the start; empty without a draft."""
        if self.llm.llm_engine.vllm_config.speculative_config is None:
            return {}
        counts = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        names = {"drafted": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}
        return {name: counts[metric] for name, metric in names.items()}
