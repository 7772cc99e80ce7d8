"""A fingerprint of a model's weights, so that profiles and results record which model they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from adaskip.core import hf
from adaskip.core.quantised import bitsandbytes_tensors, further_tensors, is_bitsandbytes, plain_tensors
from adaskip.core.wrappers import unwrapped

SAMPLES = 1024  # about the maximum number of elements read from each tensor
ALGORITHM, PORTABLE = "v1", "portable-v1"  # part of the hash; change it when the sampling changes


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and the bytes of about 1024 evenly spaced elements of every weight.

    Weights are the parameters, the buffers that are saved with them, and quantised weights that are neither (see
    `quantised`). The same weights give the same fingerprint on every device, also if accelerate offloads or shards
    them, if the model is inside a wrapper that `wrappers.unwrapped` supports, and after bitsandbytes has repacked them.

    It detects other names, shapes or dtypes, and every change of many elements: another checkpoint or revision,
    training, quantisation, a conversion to another dtype and back. It does not detect a change of a few elements that
    are all between the sampled ones (tensors of up to 1024 elements are read completely), nor changes of anything else
    than weights; `config_fingerprint` covers the configuration.

    For a model with adapters (PEFT) it covers the weights of the base model and of every loaded adapter, active or not.
    `adapters.active_adapters` tells which one is active and how it is scaled.

    Raises:
        ValueError: a weight has no data (meta device), or cannot be read.
    """
    return fingerprint_of(sorted(_weights(unwrapped(model)), key=lambda item: item[0]))


def portable_fingerprint(model: nn.Module) -> str:
    """A fingerprint that is the same in float32 and bfloat16: of dtypes and rounding below bfloat16 it knows nothing.

    So a plan made on a CPU is known for the same weights on a GPU. Else as `weights_fingerprint`.
    """
    return fingerprint_of(sorted(_weights(unwrapped(model)), key=lambda item: item[0]), portable=True)


def fingerprint_of(weights: Iterable[tuple[str, Tensor]], *, portable: bool = False) -> str:
    """The fingerprint of weights, given in the order of their names; each may be let go of after its turn.

    portable: as of `portable_fingerprint`. Raises ValueError as `weights_fingerprint` does.
    """
    digest = hashlib.sha256((PORTABLE if portable else ALGORITHM).encode())
    for name, tensor in weights:
        if tensor.is_meta:
            raise ValueError(f"weight {name} has no data (meta device): a fingerprint needs loaded weights")
        is_rounded = portable and tensor.is_floating_point()
        dtype = "" if is_rounded else f" {tensor.dtype}"
        digest.update(f"{name} {tuple(tensor.shape)}{dtype}\n".encode())
        digest.update(_sample(tensor, torch.bfloat16 if is_rounded else tensor.dtype))
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, tensor in _own_weights(module):
            yield f"{prefix}.{name}".replace(f"{hf.ORIGINAL_MODULE}.", "").lstrip("."), tensor


def _own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of the module itself, without its children, as plain tensors."""
    special = is_bitsandbytes(module)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if name in hf.non_persistent_buffers(module) or (special and name in ("weight", "bias")):
            continue
        try:
            for part, plain in plain_tensors(_loaded(module, name, tensor.detach())):
                yield name + part, plain
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"weight {name}, a {type(tensor).__name__}, cannot be read: {reason}") from error
    if special:
        yield from bitsandbytes_tensors(module)
    yield from further_tensors(module)


def _loaded(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or the offloaded copy that accelerate keeps of it."""
    for hook in hf.device_hooks(module):
        elsewhere = getattr(hook, "weights_map", None)
        if tensor.is_meta and elsewhere is not None:
            return elsewhere[name]
    return tensor


def _sample(tensor: Tensor, dtype: torch.dtype) -> bytes:
    if tensor.layout != torch.strided:
        raise ValueError(f"a weight of layout {tensor.layout} has no fingerprint; only strided (dense) weights do")
    step = max(1, tensor.numel() // SAMPLES) | 1  # odd, so that samples cover different columns of a matrix
    sample = tensor.reshape(-1)[::step].to(dtype).contiguous()
    return sample.view(torch.uint8).cpu().numpy().tobytes()
