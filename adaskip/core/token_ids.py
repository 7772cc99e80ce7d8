"""Token ids on their way in and out of `generate`: padding and end tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def end_token_ids(model: nn.Module, given: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """The tokens that end an answer: those given, else (as in `generate`) those of the model's generation config."""
    if given is None or given == [] or given == ():
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)


def is_end(token_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Where `token_ids` are end tokens, same shape; compares on the device, nothing is sent there."""
    found = torch.zeros_like(token_ids, dtype=torch.bool)
    for end in ends:
        found |= token_ids == end
    return found


def left_padded(rows: Sequence[Tensor], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [B, S], of 1-D rows; pads in front, as generation needs them."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def right_padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same with pads behind, where causal attention never sees them; the mask is boolean.

    With dynamic rope a batch is rotated as its longest row is; batch rows of one length if that matters.
    """
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
