"""Unwraps the objects around a transformers model on which `generate` can also be called."""

from __future__ import annotations

from typing import Any

from torch import nn

from adaskip.core import hf


def unwrapped(model: Any) -> Any:
    """The transformers model inside `torch.compile`, PEFT and DistributedDataParallel wrappers.

    `generate` called on such a wrapper runs on this model, so skipping is installed here. Raises ValueError for
    wrappers for which that is not true: DataParallel, and PEFT methods that put learnt tokens before the prompt.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "DataParallel runs copies of the model, in which nothing is skipped; use the model itself, or "
                "device_map to spread it over devices"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"{type(model).__name__} with {model.active_peft_config.peft_type} puts learnt tokens before the "
                "prompt, which plans do not support; adapters that change weights (LoRA and similar) are supported"
            )
        if (inside := hf.inside_compiled(model)) is not None:
            model = inside
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
