"""Dynamic-NTK rotary positions that depend only on one request, for Llama models loaded by `adaskip.models.loading`.

Dynamic NTK increases the rotary base if a sequence is longer than `max_position_embeddings`. Three behaviours exist:

- InternLM's published code caches *unrotated* keys and rotates all of them in every step with the base of the current
  length, so queries and keys always have the same base.
- Stock transformers caches *rotated* keys and raises the base with every decoded token above the limit. Older keys keep
  their angles, so queries and keys differ more and more; and the raised base stays on the module, so a long request
  affects the next one. Below the limit it equals the published code.
- Here the length of a request's first forward (its prompt) fixes the base for the whole request. Cached keys and new
  queries have the same base, as in the published code, but it is the base of the prompt length instead of the current
  length. Prefill equals the published code below and above the limit; decode equals it within the limit.

On a small trained model (stories260K, limit 128, prompts of 400 tokens decoded to 480) the KL divergence from the
published behaviour is 0.005 here and 0.23 with stock transformers, and the next token is the same in 96.7 % and 78.2 %
of the steps (measured in tests/unit/test_internlm.py). A prompt below the limit that is decoded past it keeps the plain
base, and a chunked prefill uses the base of its first chunk. A prompt of one token on a reused cache object uses the
base of the previous request from its second token on.

The length is stored on its owner, the KV cache of the request, one number per batch row. So requests may be
interleaved, and the rows of a batch do not affect each other. There is no host synchronisation and no data-dependent
branch. A decode step only reads the length: as a CUDA graph, it must not read the output of an earlier run of the
graph, which has been overwritten by then.
"""

from __future__ import annotations

import logging
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adaskip.core.hf import CACHE, with_cache_name

logger = logging.getLogger(__name__)

LENGTH = "_adaskip_prompt_length"  # attribute of a cache: [B, 1] int64, the length that fixes its rows' base


class DynamicNTKRope(nn.Module):
    """Replaces a stock `LlamaRotaryEmbedding` of type "dynamic"; below the limit the result is bit-identical."""

    inv_freq: Tensor
    exponent: Tensor

    def __init__(self, stock: LlamaRotaryEmbedding):
        super().__init__()
        config: Any = stock.config
        self.limit = int(config.max_position_embeddings)
        self.factor = float(config.rope_parameters["factor"])
        inv_freq = stock.original_inv_freq.detach().float().clone()
        size = 2 * len(inv_freq)
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=inv_freq.device) / (size - 2)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("exponent", exponent, persistent=False)
        self._lengths: dict[int, Tensor | None] = {}  # by thread, during its forward; see the hooks below
        self._traced_length: Tensor | None = None  # while a graph is traced, which must not read the thread id

    @property
    def prompt_length(self) -> Tensor | None:
        """[B, 1], the length that fixes the base of the request in this thread's forward."""
        return self._traced_length if torch.compiler.is_compiling() else self._lengths.get(get_ident())

    @prompt_length.setter
    def prompt_length(self, length: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            self._traced_length = length
        elif length is None:
            self._lengths.pop(get_ident(), None)
        else:
            self._lengths[get_ident()] = length

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, S, head_dim] on x's device and in its dtype, of positions [B, S]."""
        if self.inv_freq.device != x.device:  # a model on several devices: accelerate hooked the stock module
            self.to(x.device)
        position_ids = position_ids.to(x.device)
        inv_freq = self.inv_freq * self._stretch(position_ids) ** -self.exponent
        angles = position_ids[..., None].float() * inv_freq[:, None]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _stretch(self, position_ids: Tensor) -> Tensor:
        """[B, 1]: 1 up to the limit, above it factor * length / limit - (factor - 1).

        The base is multiplied by stretch ** (d / (d - 2)), hence frequency i by stretch ** (-2i / (d - 2)).
        """
        length = position_ids.amax(dim=-1, keepdim=True) + 1
        held = self.prompt_length
        if held is not None:
            begins = position_ids.amin(dim=-1, keepdim=True) == 0  # a reused cache object begins a new request
            length = torch.where(begins, length, held.to(length.device))
        if held is None or position_ids.shape[-1] > 1:
            self.prompt_length = length
        return 1 + self.factor * (length / self.limit - 1).clamp(min=0)


def fix_dynamic_rope(model: Any) -> bool:
    """Replace the rotary module of a model with dynamic-NTK rope by `DynamicNTKRope`; returns whether it has one."""
    decoder = model.get_decoder()
    rope = getattr(decoder, "rotary_emb", None)
    if getattr(rope, "rope_type", None) != "dynamic":
        return False
    if not isinstance(rope, LlamaRotaryEmbedding):
        logger.warning(
            "%s keeps transformers' dynamic rope: above %s positions a request's output depends on earlier requests",
            type(model).__name__,
            model.config.max_position_embeddings,
        )
        return False
    decoder.rotary_emb = DynamicNTKRope(rope)
    logger.info("dynamic-NTK rope scales prompts of more than %d tokens", decoder.rotary_emb.limit)
    decoder.register_forward_pre_hook(_recall_length, with_kwargs=True)
    decoder.register_forward_hook(_remember_length, with_kwargs=True)
    return True


def _recall_length(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    decoder.rotary_emb.prompt_length = getattr(with_cache_name(kwargs).get(CACHE), LENGTH, None)


def _remember_length(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    cache = with_cache_name(kwargs).get(CACHE)
    if cache is None:  # the first direct call: the model made the cache itself
        cache = getattr(output, CACHE, None)
    if cache is not None:
        setattr(cache, LENGTH, decoder.rotary_emb.prompt_length)
    decoder.rotary_emb.prompt_length = None
