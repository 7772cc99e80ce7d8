"""Runs the forwards of one request, of the full model and of the draft, on one KV cache."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from adaskip.core import hf
from adaskip.core.patching import ModelPatches
from adaskip.core.plan import EMPTY_PLAN, SkipPlan


class ForwardRunner:
    """Runs the prefill, draft and verification forwards of one request on its KV cache.

    clock: seconds. On the CPU those in which this thread ran: on a busy machine wall time would measure other
    processes, and the wrong drafts would seem to pay.
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
        self.prompt_length = input_ids.shape[1]
        self.clock = time.thread_time if input_ids.device.type == "cpu" else time.perf_counter
        self.lengths: dict[str, int] = {}
        self._views: dict[frozenset[int], DynamicCache] = {}

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Run the prompt through the full model and return the logits of its last token, [1, V]."""
        logits = hf.prefill(self.model, input_ids, self.config, self.kwargs).logits[0, -1:]
        hf.keep_what_leaves_the_window(self.cache)  # K/V that a draft pushes out of the window are needed again
        self._grow(self.config.max_length - self.prompt_length)
        return logits.to(input_ids.device, torch.float32, copy=True)

    def _grow(self, room: int) -> None:
        """Extend per-token arguments to the longest possible answer; each forward takes the part it needs.

        The values for answer tokens are those of transformers' `GenerationMixin._update_model_kwargs_for_generation`.
        """
        for name in ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"):
            given = self.kwargs.get(name)
            if given is None:
                continue
            self.lengths[name] = given.shape[-1]
            last = given[..., -1:].expand(*given.shape[:-1], room)
            if name == "position_ids":
                more = last + torch.arange(1, room + 1, dtype=given.dtype, device=given.device)
            elif name == "token_type_ids":
                more = last
            else:
                more = torch.full_like(last, name == "attention_mask")
            self.kwargs[name] = torch.cat([given, more], dim=-1)

    def verify(self, ids: Tensor, num_new: int) -> Tensor:
        """Logits [num_new, V] of the full model after each of the last `num_new` tokens of `ids` [1, S]."""
        self.patches.apply(EMPTY_PLAN)
        return self._run(ids, num_new, self.cache)

    def draft(self, ids: Tensor, plan: SkipPlan) -> Tensor:
        """Logits [1, V] of the skipped model after the last token of `ids` [1, S]."""
        self.patches.apply(plan)
        return self._run(ids, 1, self._view(plan.attention))

    def _run(self, ids: Tensor, num_new: int, cache: DynamicCache) -> Tensor:
        grown = ids.shape[1] - self.prompt_length
        kwargs = {**self.kwargs, hf.CACHE: cache}
        for name, length in self.lengths.items():
            kwargs[name] = kwargs[name][..., : length + grown]
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=num_new, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = num_new
        logits = self.model(**inputs, return_dict=True).logits[0, -num_new:]
        return logits.to(ids.device, torch.float32, copy=True)

    def _view(self, skipped: frozenset[int]) -> DynamicCache:
        """The cache of the draft: the same layers, with a `SkippedLayer` for each skipped attention."""
        if skipped not in self._views:
            view: Any = copy.copy(self.cache)
            view.layers = list(self.cache.layers)
            self.patches.release(view, SkipPlan(skipped))
            sliding = DynamicSlidingWindowLayer
            view.layers = [_DraftSlidingLayer(x) if isinstance(x, sliding) else x for x in view.layers]
            self._views[skipped] = view
        return self._views[skipped]

    def forget_draft(self, plan: SkipPlan, drafted: int) -> None:
        """Remove the K/V that a draft of `drafted` tokens wrote to the layers it did not skip."""
        skipped = self.patches.slots_of(plan.attention)
        for slot in self.patches.slots:
            if slot not in skipped:
                self.cache.layers[slot].crop(-drafted)  # pyright: ignore[reportAttributeAccessIssue]

    def forget_rejected(self, rejected: int) -> None:
        """Remove the last `rejected` tokens from the cache; sliding layers then shrink to their window again."""
        self.cache.crop(-rejected)

    def stop_recording(self) -> None:
        """Restore the behaviour of sliding layers: the cache may be used after the request."""
        hf.stop_keeping(self.cache)


class _DraftSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that shares the state of `layer` but returns no more K/V than the masks expect.

    While it keeps past K/V, transformers 5.17 returns all of them; after several forwards without a crop these are more
    than the length of the mask.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer):
        self.__dict__ = layer.__dict__  # pyright: ignore[reportGeneralTypeIssues]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]
