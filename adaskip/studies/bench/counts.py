"""What a generation asks of Python and of torch, counted: exact where times are too noisy to tell one per cent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.core.context import skipping
from adaskip.core.hf import TorchDispatchMode
from adaskip.strategies import Strategy

STEPS = 8


class _Operations(TorchDispatchMode):
    """Counts the operations torch dispatches: on a GPU, about the kernels that it is asked to launch."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        self.number += 1
        return func(*args, **(kwargs or {}))


def count_work(model: PreTrainedModel, strategy: Strategy | None, ids: Tensor) -> dict[str, dict[str, float]]:
    """Function calls of Python (C functions included) and torch operations, in a prefill and in a decode step."""

    @torch.no_grad()
    def generate(new_tokens: int) -> None:
        stock: Any = model.generate
        stock(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=new_tokens)

    counted = {}
    with nullcontext() if strategy is None else skipping(model, strategy):
        generate(1 + STEPS)  # what is only done once is done now
        for what, count in (("python_calls", _python_calls), ("torch_operations", _torch_operations)):
            prefill, whole = count(lambda: generate(1)), count(lambda: generate(1 + STEPS))
            counted[what] = {"prefill": prefill, "decode_step": (whole - prefill) / STEPS}
    return counted


def _torch_operations(work: Callable[[], None]) -> int:
    with _Operations() as operations:
        work()
    return operations.number


def _python_calls(work: Callable[[], None]) -> int:
    number = 0

    def see(frame, event: str, argument) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return number
