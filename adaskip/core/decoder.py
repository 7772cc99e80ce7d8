"""Finds the decoder layers of a model, where they compute, and the attribute that holds their forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adaskip.core import hf

INNER = ("language_model", "text_model", "decoder", "model", "transformer", "base_model")


class UnsupportedModelError(ValueError):
    """The model's decoder layers do not consist of two residual sublayers of a known structure."""


def find_decoder(model: nn.Module) -> Any:
    """The stock module that owns the list of decoder layers, `layers`.

    Raises UnsupportedModelError, which names the module lists that the model has instead.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only transformers models are supported"
        )
    decoder = _owner_of_layers(_get_decoder(model), seen=set())
    if decoder is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder layers named `layers`, {_lists_in(model)}; "
            "only decoder-only transformers models are supported"
        )
    return decoder


def _get_decoder(model: Any) -> Any:
    """The module that the model itself names as its decoder; in nested models it may only contain the real one."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    if get_decoder is None:
        return model
    try:
        return get_decoder()
    except Exception as error:  # the model's own code
        name = type(model).__name__
        raise UnsupportedModelError(f"{name} has no decoder: get_decoder() raises {type(error).__name__}") from error


def _owner_of_layers(module: Any, seen: set[int]) -> Any:
    """`module` or a module nested in it under one of the usual names that has a list of layers; None if none has."""
    if not isinstance(module, nn.Module) or id(module) in seen:
        return None
    seen.add(id(module))
    layers = getattr(module, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers):
        return module
    found = (_owner_of_layers(getattr(module, name, None), seen) for name in INNER)
    return next((owner for owner in found if owner is not None), None)


def _lists_in(model: nn.Module) -> str:
    """A description of the module lists that a model has."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        return "nor any other list of modules"
    return "only " + ", ".join(f"{name} ({len(lists[name])} {type(lists[name][0]).__name__})" for name in outer[:4])


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a stock model; raises UnsupportedModelError if there are none."""
    return find_decoder(model).layers


def execution_device(module: nn.Module) -> torch.device:
    """The device on which `module` computes; with accelerate's offloading its parameters are stored on another one.

    Raises ValueError if it has neither weights nor buffers.
    """
    hooks = (hook for part in module.modules() for hook in hf.device_hooks(part))
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    if device is not None:
        return torch.device(device)
    tensor = next(module.parameters(), next(module.buffers(), None))
    if tensor is None:
        raise ValueError(f"{type(module).__name__} has no weights, so it has no device to compute on")
    return tensor.device


def restore_attribute(owner: Any, name: str, own: Any) -> None:
    """Undo the replacement of an instance attribute: set it to `own`, or remove it if `own` is None."""
    if own is None:
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = own
