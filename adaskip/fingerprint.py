"""A short name for a model's weights, so that profiles and results say exactly which model they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

SAMPLES = 1024  # at most about this many elements of each tensor
ALGORITHM = "v1"  # part of the hash: another way of sampling gives another fingerprint


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and the bytes of about 1024 evenly spaced elements of every weight.

    Weights are the parameters and the buffers that are saved with them. The same weights give the same
    fingerprint on every device, offloaded by accelerate or wrapped by `torch.compile` or not. Detected are other names,
    shapes or dtypes, and any change that touches many elements: another checkpoint or revision, training, quantisation,
    a conversion to another dtype and back. Not detected is a change of a few elements that all lie between the sampled
    ones (tensors of up to 1024 elements are read whole), and anything that is not a weight, such as the configuration.

    Raises:
        ValueError: a weight has no data anywhere (meta device).
    """
    digest = hashlib.sha256(ALGORITHM.encode())
    for name, tensor in sorted(_weights(model), key=lambda item: item[0]):
        if tensor.is_meta:
            raise ValueError(f"weight {name} has no data (meta device): a fingerprint needs loaded weights")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".replace("_orig_mod.", "").lstrip("."), _loaded(module, name, tensor.detach())


def _loaded(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or what accelerate keeps for it elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        elsewhere = getattr(part, "weights_map", None)
        if tensor.is_meta and elsewhere is not None:
            return elsewhere[name]
    return tensor


def _sample(tensor: Tensor) -> bytes:
    step = max(1, tensor.numel() // SAMPLES) | 1  # odd, so that samples walk through the columns of a matrix
    sample = tensor.reshape(-1)[::step].contiguous()
    return sample.view(torch.uint8).cpu().numpy().tobytes()
