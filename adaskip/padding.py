"""Batches of token ids of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def left_padded(rows: Sequence[Tensor], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [B, S], of 1-D rows; pads in front, as generation needs them."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def right_padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same with pads behind, where causal attention never sees them; the mask is boolean."""
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
