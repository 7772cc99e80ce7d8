"""Reads quantised weights as plain tensors that depend on neither their packing nor their device.

Quantised weights are stored in different ways: tensor subclasses (torchao, quanto, DTensor) use inner tensors,
bitsandbytes uses attributes beside the parameter, and other modules use entries that only they save. In the first
forward on a CPU, bitsandbytes repacks 4-bit weights and rounds their statistics to bfloat16, moves 8-bit statistics
from the weight to the module, and casts biases to the dtype of the inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.core import hf

Content = Iterator[tuple[str, Tensor]]
"""(name, plain tensor) pairs."""


def plain_tensors(tensor: Tensor) -> Content:
    """The content of one tensor: the tensor itself, with the name "", or the values or inner tensors of a subclass.

    A sharded tensor is gathered, so all processes that hold a part must call this together. If a class can dequantise,
    its values are used, since its inner tensors may be packed for a device.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # DTensor
        yield from plain_tensors(tensor.full_tensor())  # pyright: ignore
    elif hf.is_traceable_wrapper_subclass(tensor):
        yield from _of_subclass(tensor)
    elif tensor.is_quantized:
        yield f"({tensor.dtype})", tensor.dequantize()
    elif type(tensor) is Tensor:
        yield "", tensor
    else:  # a subclass that holds its data itself, such as the parameters of bitsandbytes
        with hf.without_torch_function():
            yield "", tensor.as_subclass(Tensor)


def _of_subclass(tensor: Any) -> Content:
    name = f"({type(tensor).__name__})"
    if type(tensor).dequantize is not Tensor.dequantize:
        yield name, tensor.dequantize()
        return
    inner, _ = tensor.__tensor_flatten__()
    for attribute in sorted(inner):
        for part, plain in plain_tensors(getattr(tensor, attribute)):
            yield f"{name}.{attribute}{part}", plain


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether the module's weight is a bitsandbytes weight that has already been quantised."""
    weight = getattr(module, "weight", None)
    if type(weight).__module__.split(".")[0] != "bitsandbytes":
        return False
    return getattr(weight, "quant_state", None) is not None or _statistics_of_int8(module) is not None


def bitsandbytes_tensors(module: nn.Module) -> Content:
    """The codes and statistics of a bitsandbytes module's weight, and its bias."""
    weight: Any = module.weight
    if getattr(weight, "quant_state", None) is None:
        yield "weight (int8)", weight.data.as_subclass(Tensor)
        yield "weight.statistics", _statistics_of_int8(module).float()  # pyright: ignore
    else:
        yield from _of_4bit(weight.data.as_subclass(Tensor), weight.quant_state)
    bias = getattr(module, "bias", None)
    if bias is not None:
        yield "bias", bias.detach().bfloat16()


def _statistics_of_int8(module: Any) -> Tensor | None:
    state = getattr(module, "state", None)
    of_weight = getattr(module.weight, "SCB", None)
    return of_weight if of_weight is not None else getattr(state, "SCB", None)


def _of_4bit(codes: Tensor, state: Any) -> Content:
    if getattr(state, "packing_format_for_cpu", False):
        codes, state = _unpacked(codes, state)
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise  # pyright: ignore[reportMissingImports]

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    shape = "x".join(map(str, state.shape))
    yield f"weight ({state.quant_type}, {shape}, blocks of {state.blocksize})", codes.view(torch.uint8)
    yield "weight.values", state.code.float()
    yield "weight.statistics", absmax.reshape(-1).bfloat16()


def _unpacked(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and state as before the first forward on a CPU, from bitsandbytes' own inverse and a copy of the state."""
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        _convert_weight_packed_for_cpu_inverse,  # private: there is no public one
    )

    state = copy.copy(state)
    absmax, state.original_nested = state.absmax.T, False  # repacked statistics are no longer nested
    codes, state = _convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax = absmax
    return codes, state


def further_tensors(module: nn.Module) -> Content:
    """Tensors that a module saves besides its parameters and buffers: packed weights, extra state."""
    if not hf.saves_more(module) or is_bitsandbytes(module):
        return
    saved = hf.saved_state(module)
    known = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
    for name in saved.keys() - known:
        yield from _tensors_in(name, saved[name])


def _tensors_in(name: str, value: Any) -> Content:
    if isinstance(value, Tensor):
        for part, plain in plain_tensors(value):
            yield name + part, plain
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors_in(f"{name}.{number}", item)
    elif isinstance(value, (bool, int, float)):
        yield name, torch.tensor(value)
