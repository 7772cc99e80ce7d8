"""Compares what was exported with the plan on the model that it was made of: logits of one prompt, in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from adaskip.core.context import skipping
from adaskip.core.strategy import Strategy
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.fold import Folded, fold

PROMPT_TOKENS = 64
UNSCALED, SCALED = 1e-5, {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest allowed distance of logits: where no weight changed, and by the dtype that divided weights are rounded to.
What is left in float32 is the epsilon of the norms."""
LOADED_AS: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
"""How both models are loaded. Attention is eager because transformers 5.17's SDPA omits Gemma 2's soft-capping."""


def prompt(vocab_size: int) -> Tensor:
    """The token ids [1, 64] that logits are compared on, the same for every model of that vocabulary."""
    return torch.randint(vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))


def allowed_distance(source: Checkpoint, folded: Folded) -> float:
    """The limit of `compare`. Raises ExportError for a dtype in which no weight is divided."""
    if not folded.is_scaled:
        return UNSCALED
    if source.dtype not in SCALED:
        raise ExportError(
            f"the scales of the plan cannot be folded into {source.folder}, whose weights are {source.dtype}; allowed: "
            f"{', '.join(map(str, SCALED))}, or a plan without scales"
        )
    return SCALED[source.dtype]


def load_source(source: Checkpoint) -> PreTrainedModel:
    """The model that is exported, in float32."""
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    return stock.from_pretrained(source.folder, config=source.config, use_safetensors=True, **LOADED_AS).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, strategy: Strategy | None = None) -> Tensor:
    """Logits [T, V] of a prompt [1, T], under a strategy or of the model as it is."""
    with nullcontext() if strategy is None else skipping(model, strategy):
        return model(input_ids=ids, use_cache=False).logits[0].float()


def compare(
    source: Checkpoint,
    strategy: Strategy,
    exported: Callable[[], PreTrainedModel],
    *,
    settings: Callable[[PreTrainedModel], Any] = lambda model: None,
) -> dict[str, Any]:
    """Logits of the exported model against those of the source under `strategy`; one model is loaded at a time.

    settings: what must be equal besides, read from both models.

    Returns distance (norm of the difference over the norm of the centred logits), its limit, kl (mean over the tokens,
    nats), same_argmax (share of the tokens), tokens and dtype.

    Raises:
        ExportError: the distance is beyond the limit, or `settings` differ.
    """
    ids = prompt(source.config.get_text_config().vocab_size)
    model = load_source(source)
    dtype = source.dtype
    expected, wanted = logits(model, ids, strategy), settings(model)
    del model
    model = exported()
    found, given = logits(model, ids), settings(model)
    if wanted != given:
        raise ExportError(
            f"layers of the exported model are set up otherwise than in the source: {given}, not {wanted}"
        )
    limit = allowed_distance(source, fold(strategy))
    result = {**differences(found, expected), "limit": limit, "tokens": ids.shape[1], "weights": str(dtype)}
    if not result["distance"] <= limit:
        raise ExportError(
            f"the exported model's logits differ from those under the plan by {result['distance']:.2g} of their size; "
            f"allowed: {limit:g} (with large scales the epsilon of the norms counts)"
        )
    return result


def differences(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Logits [T, V] against those expected: distance, kl and same_argmax of `compare`."""
    centred = expected - expected.mean(-1, keepdim=True)
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return {
        "distance": float((found - expected).norm() / centred.norm()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "same_argmax": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
