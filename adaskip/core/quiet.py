"""Runs a model without side effects: user hooks do not fire, and the model's state is restored afterwards.

Hooks that are part of the computation stay active: those of libraries that split, load or quantise models. The module
that defines a hook's function tells which library it belongs to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from adaskip.core import hf

# packages whose hooks move, split or dequantise tensors of the computation; `transformers_modules` is remote code
COMPUTING = frozenset({
    "torch", "torchao", "transformers", "transformers_modules", "accelerate", "peft", "adaskip", "deepspeed",
    "bitsandbytes", "optimum", "auto_gptq", "gptqmodel", "awq", "hqq", "compressed_tensors", "kernels",
})  # fmt: skip


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """A context for eager calls that leave `model`, its hooks and the random number generators unchanged.

    Autocast is off, so that results do not depend on the caller. Instance attributes and buffers are restored by
    identity, except on modules with weights of their own, which may pack their weights in place in the first forward.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in _device_types(model):
            stack.enter_context(torch.autocast(device, enabled=False))
        if hf.is_compiler_loaded():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_same_random_numbers(model))
        stack.enter_context(_same_attributes(model))
        stack.enter_context(without_user_hooks(model))
        yield


def _device_types(model: nn.Module) -> list[str]:
    return sorted({"cpu", *(p.device.type for p in model.parameters())} - {"meta"})


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Restore the state of Python's, NumPy's and torch's global random number generators on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    devices: dict[str, set[int]] = {}
    for parameter in model.parameters():
        if parameter.device.type in ("cuda", "xpu"):  # other device types have no generator per device
            devices.setdefault(parameter.device.type, set()).add(parameter.device.index or 0)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))
        for device_type, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=device_type))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """On exit, restore the attributes, buffers and children of modules without weights of their own, by identity."""
    owners = [module for module in model.modules() if not hf.own_parameters(module)]
    holders: list[dict[str, Any]] = [held for module in owners for held in hf.holders(module)]
    saved = [dict(held) for held in holders]
    try:
        yield
    finally:
        for held, before in zip(holders, saved, strict=True):
            for name in [name for name in held if name not in before]:
                del held[name]
            held.update({name: value for name, value in before.items() if held.get(name) is not value})


@contextmanager
def without_user_hooks(model: nn.Module) -> Iterator[None]:
    """Disable the user's forward hooks and pre-hooks, global and on any module of `model`; their order is kept.

    The hook dictionaries stay the same objects, since hook handles refer to them.
    """
    held = list(hf.hook_dictionaries(model.modules()))
    saved = [dict(hooks) for hooks in held]
    try:
        for hooks in held:
            for key in [key for key, hook in hooks.items() if not computes(hook)]:
                del hooks[key]
        yield
    finally:
        for hooks, before in zip(held, saved, strict=True):
            if list(hooks.items()) != list(before.items()):
                hooks.clear()
                hooks.update(before)


def computes(hook: Any) -> bool:
    """Whether a hook is part of the model's computation, judged by the package that defines it."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)  # a bound method
    module = hook.__module__ if hasattr(hook, "__qualname__") else type(hook).__module__
    return (module or "").split(".")[0] in COMPUTING
