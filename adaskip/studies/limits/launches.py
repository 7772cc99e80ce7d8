"""The other limit: the number of operators that a decode step dispatches, each of which launches a kernel.

If the device computes a step faster than Python launches it, launches are the limit, not bytes. Counting needs no GPU:
the operators do not depend on widths, so a narrow copy of the model runs the step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from adaskip.core.context import skipping
from adaskip.core.hf import CACHE, TorchDispatchMode
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.strategies import FixedPlan

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NARROW = {"intermediate_size": 4, "vocab_size": 8, "head_dim": 4, **TOKENS}
WITHOUT_KERNEL = frozenset({"aten::_unsafe_view"})
"""A view that is not declared as one."""


class _Counter(TorchDispatchMode):
    """Counts operators that compute something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.name().split(".")[0] in WITHOUT_KERNEL)
        return func(*args, **(kwargs or {}))


class Launches:
    """Operators per decode step of a model, counted once per plan on a narrow random model of the same depth, heads and
    options in bfloat16."""

    def __init__(self, config: PreTrainedConfig):
        config, self._counts = copy.deepcopy(config), {}
        for name, value in {**NARROW, "hidden_size": NARROW["head_dim"] * config.num_attention_heads}.items():
            setattr(config, name, value)
        options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        self._model = AutoModelForCausalLM.from_config(config, **options).eval()
        self.num_layers: int = config.num_hidden_layers

    @torch.no_grad()
    def of(self, plan: SkipPlan) -> int:
        """Operators dispatched by one decode step under `plan`, from embedding to logits."""
        if plan not in self._counts:
            cache, counter = DynamicCache(config=self._model.config), _Counter()
            with skipping(self._model, FixedPlan(num_layers=self.num_layers, plan=plan)):
                self._model(input_ids=torch.ones(1, 4, dtype=torch.long), **{CACHE: cache})
                with counter:
                    self._model(input_ids=torch.ones(1, 1, dtype=torch.long), **{CACHE: cache})
            self._counts[plan] = counter.count
        return self._counts[plan]

    def by_kind(self) -> dict[str, int]:
        """The operators of a whole step, and those of the attention and of the FFN of the last layer."""
        last, step = frozenset({self.num_layers - 1}), self.of(EMPTY_PLAN)
        attention, ffn = self.of(SkipPlan(attention=last)), self.of(SkipPlan(ffn=last))
        return {"step": step, "attention": step - attention, "ffn": step - ffn}
