"""Runs the forwards of a batch whose rows keep different numbers of the tokens of a forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from adaskip.core import hf
from adaskip.core.patching import ModelPatches
from adaskip.core.plan import EMPTY_PLAN


class BatchForwards:
    """Prefill and verifications of a batch on one KV cache.

    A forward appends a column to the cache for each of its tokens. Columns are live or not, row by row: pads and
    rejected tokens are masked. Keys carry their positions, so the order of columns does not matter: what a row keeps of
    the last columns moves to its free ones before them, and the cache is as long as the longest row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        patches: ModelPatches,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self.model: Any = model
        self.patches, self.config, self.kwargs = patches, config, model_kwargs
        self.cache: DynamicCache = model_kwargs[hf.CACHE]
        self.clock = time.thread_time if input_ids.device.type == "cpu" else time.perf_counter
        mask = model_kwargs.get("attention_mask")
        self.live = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
        self.positions: Tensor = model_kwargs["position_ids"][:, -1:] + 1
        self.last_positions = self.positions + config.max_length - input_ids.shape[1] - 1

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Run the prompts [B, S] through the full model and return the logits of their last tokens, [B, V]."""
        self.patches.apply(EMPTY_PLAN)
        logits = hf.prefill(self.model, input_ids, self.config, self.kwargs).logits[:, -1]
        return logits.to(input_ids.device, torch.float32, copy=True)

    def verify(self, tokens: Tensor) -> Tensor:
        """Logits [B, Q, V] of the full model after each of the next tokens [B, Q] of every row."""
        self.patches.apply(EMPTY_PLAN)
        ahead = torch.arange(tokens.shape[1], device=tokens.device)
        positions = (self.positions + ahead).minimum(self.last_positions)  # a short draft is filled up
        mask = torch.cat([self.live, torch.ones_like(tokens, dtype=torch.bool)], dim=-1)
        kwargs = {**self.kwargs, "attention_mask": mask.long(), "position_ids": positions}
        inputs = self.model.prepare_inputs_for_generation(tokens, next_sequence_length=tokens.shape[1], **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = tokens.shape[1]
        logits = self.model(**inputs, return_dict=True).logits[:, -tokens.shape[1] :]
        return logits.to(tokens.device, torch.float32, copy=True)

    def keep(self, kept: Sequence[int], fed: int) -> None:
        """Keep the K/V of the first kept[row] of the `fed` tokens of the last forward, and remove the others."""
        counts = torch.tensor(kept, device=self.live.device)[:, None]
        self.positions = self.positions + counts
        fresh = torch.arange(fed, device=counts.device) < counts
        live = torch.cat([self.live, fresh], dim=-1)
        length = int(live.sum(dim=-1).max())
        moving, free = live[:, length:], ~live[:, :length]
        filled = free & (free.cumsum(dim=-1) <= moving.sum(dim=-1, keepdim=True))
        rows, source = moving.nonzero(as_tuple=True)
        _, target = filled.nonzero(as_tuple=True)
        if len(rows):
            self._move(rows, source + length, target)
        self.cache.crop(length - live.shape[1])
        self.live = live[:, :length] | filled

    def _move(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy the K/V of columns `source` to columns `target` in every layer. rows, source, target: [N]."""
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                assert states is not None, "the prompt has filled it"
                row, start, end = (index.to(states.device) for index in (rows, source, target))
                states[row, :, end] = states[row, :, start]
