"""Executes skip plans on a stock model by replacing the forward of each decoder layer instance.

A layer with nothing to skip and nothing to measure calls its stock forward, so an empty plan is the stock model.
Nothing here knows a strategy by name. What a layer has to do changes between steps, outside compiled code; scales
are 0-dim tensors, so that a new scale is no new graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adaskip.blocks import (
    BlockStructure,
    decoder_layers,
    execution_device,
    find_decoder,
    find_structure,
    forward_attribute,
    restore_attribute,
)
from adaskip.plan import EMPTY_PLAN, Affine, Compensation, SkipPlan, SublayerKind

NOTHING: frozenset[int] = frozenset()


class SublayerProbe(Protocol):
    """Takes part in a layer's forward to measure it."""

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        """See input `a`, output `b` and, of a sublayer, `change` = b - a, all [B, S, D].

        kind: "attention", "ffn", or "layer" for both together.
        """
        ...


class LayerPatch:
    """What one decoder layer does in the current step."""

    def __init__(self, layer: nn.Module, index: int, structure: BlockStructure):
        self.layer, self.index, self.structure = layer, index, structure
        self.skip_attention = self.skip_ffn = self.measure_ffn = False
        self.scales: dict[SublayerKind, Compensation] = {"attention": 1.0, "ffn": 1.0}
        self.deltas: dict[SublayerKind, Tensor | None] = {"attention": None, "ffn": None}  # scale - 1
        self.shifts: dict[SublayerKind, Tensor | None] = {"attention": None, "ffn": None}
        self.probe: SublayerProbe | None = None
        self.ffn_io: tuple[Tensor, Tensor] | None = None
        self.stock: Any = None

    @property
    def idle(self) -> bool:
        return not (self.skip_attention or self.skip_ffn or self.measure_ffn) and self.probe is None

    def set_scale(self, kind: SublayerKind, scale: Compensation) -> None:
        """Compensate a skipped sublayer by `scale`; for a factor the device fills a 0-dim tensor itself."""
        if scale == self.scales[kind]:
            return
        self.scales[kind] = scale
        dtype = next(p.dtype for p in self.layer.parameters() if p.is_floating_point())
        device = execution_device(self.layer)
        if isinstance(scale, Affine):
            self.deltas[kind] = torch.tensor(scale.scale, dtype=torch.float64).sub(1.0).to(device, dtype)
            self.shifts[kind] = torch.tensor(scale.shift, dtype=dtype, device=device)
        else:
            delta = torch.full((), scale - 1.0, dtype=dtype, device=device)
            self.deltas[kind], self.shifts[kind] = None if scale == 1.0 else delta, None

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """The layer without its skipped sublayers. hidden_states: [B, S, D], as is what is returned."""
        if self.idle:
            return self.stock(hidden_states, *args, **kwargs)
        entry = hidden_states
        if self.skip_attention:
            hidden_states = _compensated(hidden_states, self.deltas["attention"], self.shifts["attention"])
        else:
            hidden_states = self._run("attention", hidden_states, kwargs)
        middle = hidden_states
        if self.skip_ffn:
            hidden_states = _compensated(hidden_states, self.deltas["ffn"], self.shifts["ffn"])
        else:
            hidden_states = self._run("ffn", hidden_states, None)
        if self.measure_ffn:
            self.ffn_io = (middle, hidden_states)
        if self.probe is not None:
            self.probe.record("layer", self.index, entry, hidden_states, None)
        return hidden_states

    def _run(self, kind: SublayerKind, hidden_states: Tensor, kwargs: dict[str, Any] | None) -> Tensor:
        sublayer = self.structure.attention if kind == "attention" else self.structure.ffn
        change = sublayer.change(self.layer, hidden_states, kwargs)
        output = hidden_states + change
        if self.probe is not None:
            self.probe.record(kind, self.index, hidden_states, output, change)
        return output


def _compensated(hidden_states: Tensor, delta: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * h + shift as (h + shift) + h * (scale - 1): in half precision a scale near 1 would lose most digits.

    Paper: Eq. (4), where there is no shift. delta: scale - 1, 0-dim or [D], or None for a scale of exactly 1.
    shift: [D] or None.
    """
    shifted = hidden_states if shift is None else hidden_states + shift
    return shifted if delta is None else torch.addcmul(shifted, hidden_states, delta)


class ModelPatches:
    """The layer patches of one model. They outlive a context, so that compiled graphs can be used again."""

    def __init__(self, model: nn.Module):
        structure = find_structure(model)
        self.layers = tuple(decoder_layers(model))
        self.patches = tuple(LayerPatch(layer, i, structure) for i, layer in enumerate(self.layers))
        self.installed = False
        self._saved: list[tuple[nn.Module, str, Any]] = []
        self._plan: SkipPlan | None = EMPTY_PLAN
        self._measured: frozenset[int] | None = NOTHING

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether the model still has the layers these patches were made for."""
        layers = decoder_layers(model)
        return len(layers) == len(self.layers) and all(a is b for a, b in zip(layers, self.layers, strict=True))

    @contextmanager
    def install(self) -> Iterator[ModelPatches]:
        """Put the patches in place; on exit, also by an exception, every layer is exactly as before."""
        if self.installed:
            raise ValueError("the model is already inside skipping(...) or a calibration; contexts do not nest")
        self.installed = True
        try:
            for patch in self.patches:
                name = forward_attribute(patch.layer)
                self._saved.append((patch.layer, name, patch.layer.__dict__.get(name)))
                patch.stock = getattr(patch.layer, name)
                patch.layer.__dict__[name] = patch.forward
            yield self
        finally:
            for layer, name, own in self._saved:
                restore_attribute(layer, name, own)
            self._saved.clear()
            self.apply(EMPTY_PLAN)
            self.set_probe(None)
            for patch in self.patches:
                patch.stock = patch.ffn_io = None
            self.installed = False

    def apply(self, plan: SkipPlan, measured_ffns: frozenset[int] = NOTHING) -> None:
        """From the next forward on, skip `plan` and keep input and output of the FFNs in `measured_ffns`."""
        if plan is self._plan and measured_ffns is self._measured:
            return  # the usual decode step: nothing changes
        self._plan = self._measured = None  # should this be interrupted, the next call starts afresh
        for i, patch in enumerate(self.patches):
            patch.skip_attention, patch.skip_ffn = i in plan.attention, i in plan.ffn
            patch.measure_ffn = i in measured_ffns
            if patch.skip_attention:
                patch.set_scale("attention", plan.scale("attention", i))
            if patch.skip_ffn:
                patch.set_scale("ffn", plan.scale("ffn", i))
        self._plan, self._measured = plan, measured_ffns

    def set_probe(self, probe: SublayerProbe | None) -> None:
        """From the next forward on, show every sublayer's input and output to `probe`."""
        for patch in self.patches:
            patch.probe = probe

    def take_ffn_io(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Input and output, [B, S, D], of the FFNs measured in the last forward; forgets them."""
        taken = {patch.index: patch.ffn_io for patch in self.patches if patch.ffn_io is not None}
        for patch in self.patches:
            patch.ffn_io = None
        return taken


_PATCHES: WeakKeyDictionary[nn.Module, ModelPatches] = WeakKeyDictionary()


def patches_of(model: nn.Module) -> ModelPatches:
    """The patches of a model, made at first use and kept as long as the model lives.

    Raises UnsupportedModelError if its blocks cannot be skipped, ValueError if it is in training mode.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; skipping is for inference: call model.eval()")
    decoder = find_decoder(model)
    known = _PATCHES.get(decoder)
    if known is None or not known.belongs_to(model):
        known = _PATCHES[decoder] = ModelPatches(model)
    return known
