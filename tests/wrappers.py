"""Stand-ins for what people wrap around a transformers model."""

from __future__ import annotations

import torch
from torch import nn


class AdapterModel(nn.Module):
    """What a PEFT model is to transformers' methods: they run on the model inside."""

    def __init__(self, model, prompt_learning: bool = False):
        super().__init__()
        self.inner = model
        self.active_peft_config = type("Config", (), {"is_prompt_learning": prompt_learning, "peft_type": "PREFIX"})()

    def get_base_model(self):
        return self.inner

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.inner.prepare_inputs_for_generation(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {"peft": AdapterModel, "compile": compiled}
