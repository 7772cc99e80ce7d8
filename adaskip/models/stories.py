"""stories260K, a Llama of five layers trained on children's stories, which studies use if it is available."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.core.decoding import plain_generate
from adaskip.core.token_ids import end_token_ids
from adaskip.models.loading import LoadedModel, load_model

STORIES = "stories260K"
VARIABLE = "ADASKIP_REAL"
"""Environment variable with the folder that contains the model's folder."""
CALIBRATION_STORIES = 20
BEGINNINGS = (
    "Once upon a time, there was a little girl named",
    "One day, a big dog",
    "Tom and his mom went to the park. They",
    "Lily liked to play with her",
)
TOLD_TOGETHER = 16
NOT_AT_HAND = f"{STORIES} was left out: {VARIABLE} does not name a folder that contains it."


def stories_dir() -> Path | None:
    """The folder of the model; None if it is not available."""
    folder = os.environ.get(VARIABLE)
    found = Path(folder) / STORIES if folder else None
    return found if found is not None and found.is_dir() else None


def load_stories() -> LoadedModel:
    """The model in float32 on the CPU.

    Raises:
        ValueError: it is not available.
    """
    folder = stories_dir()
    if folder is None:
        raise ValueError(f"{STORIES} is not available: {VARIABLE} must name the folder that contains it")
    return load_model(None, checkpoint=str(folder), device="cpu", dtype="float32")


@torch.no_grad()
def tell(loaded: LoadedModel, count: int, length: int, seed: int) -> list[Tensor]:
    """Sample `count` stories of exactly `length` tokens from the model, each [S]; shorter ones are dropped.

    Of the model's generation config, only the end tokens are used.
    """
    tokenizer: Any = loaded.tokenizer
    ends = torch.tensor(loaded.spec.stop_token_ids)
    kept: list[Tensor] = []
    torch.manual_seed(seed)
    while len(kept) < count:
        for beginning in BEGINNINGS:
            prompt = torch.tensor(tokenizer(beginning).input_ids)[None].expand(TOLD_TOGETHER, -1)
            told = plain_generate(
                loaded.model,
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                max_length=length,
                eos_token_id=list(end_token_ids(loaded.model)) or None,
                pad_token_id=0,
            )
            whole = ~torch.isin(told[:, prompt.shape[1] :], ends).any(dim=1)
            kept += list(told[whole]) if told.shape[1] == length else []
    order = torch.randperm(len(kept)).tolist()  # so that calibration and test stories have the same beginnings
    return [kept[i] for i in order[:count]]


def tell_split(loaded: LoadedModel, count: int, length: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The stories of `tell` that calibrate, and `count` others."""
    told = tell(loaded, CALIBRATION_STORIES + count, length, seed)
    return told[:CALIBRATION_STORIES], told[CALIBRATION_STORIES:]
