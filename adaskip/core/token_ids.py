"""Padding and end tokens for the token ids that go into and come out of `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def end_token_ids(model: nn.Module, given: int | Sequence[int] | Tensor | None = None) -> tuple[int, ...]:
    """The tokens that end an answer: `given`, else (as in `generate`) those of the model's generation config."""
    if isinstance(given, Tensor):
        given = given.flatten().tolist()
    if given is None or given == [] or given == ():
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return ()
    ids: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if wrong := [each for each in ids if isinstance(each, bool) or not isinstance(each, int)]:
        raise ValueError(f"end tokens must be token ids; got {wrong[0]!r}")
    return tuple(ids)


def is_end(token_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """A bool mask of the end tokens in `token_ids`, same shape; computed without a host-device copy."""
    found = torch.zeros_like(token_ids, dtype=torch.bool)
    for end in ends:
        found |= token_ids == end
    return found


def left_padded(rows: Sequence[Tensor], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [B, S], of 1-D rows padded on the left, as generation needs them."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def right_padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, int64 [B, S], and a bool mask of 1-D rows padded on the right, where causal attention ignores pads.

    Dynamic rope rotates a whole batch by the length of its longest row; if that matters, batch rows of equal length.
    """
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
