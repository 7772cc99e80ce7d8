"""The fingerprint of weights that are no plain tensors: what they hold counts, how they are packed does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from adaskip.calibration.measure import calibrate
from adaskip.core.fingerprint import weights_fingerprint
from adaskip.profiles.importance import ImportanceProfile
from tests.families import random_model, random_prompts

WIDE = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


class Codes(torch.Tensor):
    """int8 codes and a scale per row behind a floating-point face, as torchao and quanto make them."""

    packed = False

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"])

    def values(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            copied = cls(*(func(getattr(args[0], name)) for name in ("codes", "scale")))
            copied.packed = args[0].packed
            return return_and_correct_aliasing(func, args, kwargs or {}, copied)
        if func in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*(a.values() if isinstance(a, cls) else a for a in args))
        raise NotImplementedError(f"{func} of Codes")


class PackedCodes(Codes):
    """The same, which may be packed for a device; it can dequantise."""

    def dequantize(self):
        codes = self.codes.flip(0) if self.packed else self.codes
        return codes * self.scale  # one scale for all rows

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(dim=(0, 1), keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def pack(self):
        self.codes, self.packed = self.codes.flip(0), True


def quantised(kind, seed=0):
    model = random_model("llama", num_layers=2, seed=seed)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(kind.of(module.weight.data), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", [Codes, PackedCodes])
def test_a_tensor_subclass_counts_with_what_it_holds(kind):
    model = quantised(kind)
    fingerprint = weights_fingerprint(model)
    assert weights_fingerprint(quantised(kind)) == fingerprint
    assert weights_fingerprint(quantised(kind, seed=1)) != fingerprint
    assert weights_fingerprint(random_model("llama", num_layers=2)) != fingerprint
    weight = model.model.layers[0].mlp.up_proj.weight
    for inner in (weight.codes, weight.scale):
        inner[0, 0] += 1
        assert weights_fingerprint(model) != fingerprint
        inner[0, 0] -= 1


def test_packing_does_not_matter_to_a_subclass_that_can_dequantise():
    model = quantised(PackedCodes)
    fingerprint = weights_fingerprint(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.pack()
    assert not torch.equal(weight.codes.flip(0), weight.codes)
    assert weights_fingerprint(model) == fingerprint


def test_a_model_of_a_tensor_subclass_is_calibrated_and_its_profile_loaded(tmp_path):
    prompts = random_prompts([9, 5])
    for phase in ("prefill", "decode"):
        path = calibrate(quantised(Codes), prompts, phase=phase, max_new_tokens=4).save(tmp_path / "p.json")
        ImportanceProfile.load(path, quantised(Codes))


def test_a_parameter_class_of_ones_own_is_read_as_the_tensor_it_is():
    class Own(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.reshape, torch.Tensor.__getitem__):
                raise NotImplementedError
            return super().__torch_function__(func, types, args, kwargs)

    plain, own = nn.Linear(3, 2), nn.Linear(3, 2)
    own.load_state_dict(plain.state_dict())
    own._parameters["weight"] = plain.weight.data.as_subclass(Own)
    own._parameters["bias"] = plain.bias
    assert weights_fingerprint(own) == weights_fingerprint(plain)


class Packed(nn.Module):
    """A module that keeps its weight where only its saving finds it."""

    def __init__(self, value):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))
        self.hidden = [(torch.full((3,), value), 4)]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = self.hidden


def test_what_only_a_modules_saving_finds_counts():
    assert weights_fingerprint(Packed(1.0)) == weights_fingerprint(Packed(1.0))
    assert weights_fingerprint(Packed(1.0)) != weights_fingerprint(Packed(2.0))


def test_a_weight_that_cannot_be_read_is_one_clear_error():
    class Unreadable(Codes):
        def __tensor_flatten__(self):
            raise NotImplementedError("no flattening\nhere")

    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(Unreadable.of(model.weight.data), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight weight, a .*, cannot be read: no flattening$"):
        weights_fingerprint(model)


def replaced(model, make):
    """The model with each linear layer but the head made by `make`, holding its weights, quantised on the CPU."""
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = make(child.in_features, child.out_features, bias=child.bias is not None)
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to("cpu"))
    return model.eval()


KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 twice": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4"},
    "nf4 in bfloat16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    "int8": None,
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_bitsandbytes_weights_keep_their_fingerprint_through_the_first_forward(options, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def fresh(seed=0):
        def make(inputs, outputs, bias):
            if options is None:
                return bnb.nn.Linear8bitLt(inputs, outputs, bias=bias, has_fp16_weights=False)
            return bnb.nn.Linear4bit(inputs, outputs, bias=bias, compute_dtype=torch.bfloat16, **options)

        return replaced(random_model("llama", seed=seed, attention_bias=True, **WIDE).bfloat16(), make)

    model = fresh()
    fingerprint = weights_fingerprint(model)
    profile = calibrate(model, random_prompts([9, 5]), phase="decode", max_new_tokens=4)
    assert weights_fingerprint(model) == profile.weights_fingerprint == fingerprint
    ImportanceProfile.load(profile.save(tmp_path / "p.json"), fresh())
    assert weights_fingerprint(fresh(seed=1)) != fingerprint
    other = fresh()
    weight = other.model.layers[0].mlp.up_proj.weight
    (weight.SCB if options is None else weight.quant_state.absmax).view(-1)[0] += 1
    assert weights_fingerprint(other) != fingerprint
