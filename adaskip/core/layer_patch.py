"""Replaces the forward of one decoder layer, and skips or measures its sublayers in the current step.

A layer with nothing to skip or measure calls its stock forward, so an empty plan is the stock model. Scales and shifts
are tensors that keep their address and are written in place, so that a new scale neither triggers a new graph of
`torch.compile` nor leaves a stale address in a captured CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaskip.core import hf
from adaskip.core.blocks import OUTPUT_SCALAR, Proved, execution_device, restore_attribute
from adaskip.core.kv_cache import KVOnly, KVWritten
from adaskip.core.plan import Affine, Compensation, SublayerKind

FORWARDS = ("forward", hf.STOCK_FORWARD)
"""The attributes that may hold a layer's own forward."""


class SublayerProbe(Protocol):
    """An observer that layer patches call with the inputs and outputs of each sublayer."""

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        """Take input `a`, output `b` and, for a sublayer, `change` = b - a, all [B, S, D].

        kind: "attention", "ffn", or "layer" for the whole layer.
        """
        ...


class Turn:
    """The forward that the patches currently apply to.

    thread: identity of the thread that runs it; None between forwards. compiled: it runs a compiled graph, whose trace
    must not read the thread identity.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.compiled = False


FOR_GOOD = "the model was loaded by adaskip.from_pretrained and skips for good"


class StaysInPlace:
    """Refuses to be copied or pickled: a copy of the model made inside a context would stay skipped for ever.

    for_good: the context is one that the model never leaves.
    """

    for_good = False

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        if self.for_good:
            raise ValueError(f"{FOR_GOOD}: it cannot be copied or pickled; load it again, or the stock model instead")
        raise ValueError(
            "the model is inside skipping(...) or a measurement, which is bound to this model object; copy or pickle "
            "the model outside of it (save_pretrained and state_dict also work inside)"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce_ex__(None)


LayerWork = tuple[str | None, str | None, bool]
Work = tuple[LayerWork, ...]


class LayerPatch(StaysInPlace):
    """The patched forward of one decoder layer, and what it skips and measures in the current step."""

    def __init__(self, layer: nn.Module, index: int, proved: Proved, turn: Turn):
        self.layer, self.index, self.structure, self.turn = layer, index, proved.structure, turn
        self.width = proved.stream_width
        self.finishes = hasattr(layer, OUTPUT_SCALAR)
        self.skip_attention = self.keep_kv = self.skip_ffn = self.measure_ffn = False
        self.idle = True
        self.deltas: dict[SublayerKind, Tensor | None] = {}  # scale - 1, for the kinds in `scales`
        self.shifts: dict[SublayerKind, Tensor | None] = {}
        self.probe: SublayerProbe | None = None
        self.ffn_io: tuple[Tensor, Tensor] | None = None
        self.stock: Any = None
        self.own: Any = None  # the layer's own instance attribute before the patch, if it had one
        self.bound: Any = None  # the patched forward, while installed
        self.name = "forward"
        self.device, self.dtype = execution_device(layer), proved.stream_dtypes[index]  # where scales live
        self._forget_scales()

    def _forget_scales(self) -> None:
        self.scales: dict[SublayerKind, Compensation] = {}
        self.buffers: dict[tuple[str, str], Tensor] = {}  # storage of deltas and shifts

    def install(self) -> None:
        """Replace the stock forward. Drops scales that were stored on another device."""
        if (device := execution_device(self.layer)) != self.device:
            self.device = device
            self._forget_scales()
        self.name = hf.forward_name(self.layer)
        self.own = self.layer.__dict__.get(self.name)
        if isinstance(getattr(self.own, "__self__", None), LayerPatch):
            raise ValueError(
                f"layer {self.index} ({type(self.layer).__name__}) is also a layer of another model that is inside "
                "skipping(...), a lossless generation or a measurement; leave that first"
            )
        self.stock = getattr(self.layer, self.name)
        self.layer.__dict__[self.name] = self.bound = self.forward

    def remove(self) -> None:
        """Restore the layer's forward in whichever attribute holds the patch; replacements made by others stay."""
        for name in FORWARDS:
            if self.layer.__dict__.get(name) is self.bound and self.bound is not None:
                restore_attribute(self.layer, name, self.own if name == self.name else self.stock)
        self.bound = self.ffn_io = None

    @property
    def in_place(self) -> bool:
        """Whether a call of the layer still reaches this patch, possibly through accelerate's hook."""
        return any(self.layer.__dict__.get(name) is self.bound for name in FORWARDS)

    def set_work(self, *, skip_attention: bool, keep_kv: bool, skip_ffn: bool, measure_ffn: bool) -> None:
        """Set what the layer skips and measures from the next forward on. keep_kv: a skipped attention writes K/V."""
        self.skip_attention, self.keep_kv = skip_attention, skip_attention and keep_kv
        self.skip_ffn, self.measure_ffn = skip_ffn, measure_ffn
        self._update_idle()

    def set_probe(self, probe: SublayerProbe | None) -> None:
        """Set the observer of the layer's sublayers from the next forward on; None for no observer."""
        self.probe = probe
        self._update_idle()

    def _update_idle(self) -> None:
        self.idle = not (self.skip_attention or self.skip_ffn or self.measure_ffn) and self.probe is None

    def set_scale(self, kind: SublayerKind, scale: Compensation) -> None:
        """Set the compensation of a skipped sublayer, in place; a factor is filled in without a host-device copy."""
        if scale == self.scales.get(kind):
            return
        self.scales.pop(kind, None)  # after an interrupt, the next call writes all again
        if isinstance(scale, Affine):
            self.check_width(scale)
            deltas = torch.tensor(scale.scale, dtype=torch.float64).sub_(1.0)
            shifts = torch.tensor(scale.shift, dtype=torch.float64)
            self.deltas[kind] = self._buffer(kind, "deltas", deltas.shape).copy_(deltas, non_blocking=True)
            self.shifts[kind] = self._buffer(kind, "shifts", shifts.shape).copy_(shifts, non_blocking=True)
        else:
            self.deltas[kind] = None if scale == 1.0 else self._buffer(kind, "delta", ()).fill_(scale - 1.0)
            self.shifts[kind] = None
        self.scales[kind] = scale

    def check_width(self, scale: Affine) -> None:
        """Raise ValueError unless `scale` has one entry per channel of the residual stream."""
        if len(scale.scale) != self.width:
            raise ValueError(
                f"the affine compensation of layer {self.index} has {len(scale.scale)} channels, but the hidden states "
                f"have {self.width}"
            )

    def _buffer(self, kind: SublayerKind, name: str, shape: Sequence[int]) -> Tensor:
        if (kind, name) not in self.buffers:
            with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                self.buffers[kind, name] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.buffers[kind, name]

    def _follow(self, dtype: torch.dtype) -> None:
        """Rewrite the scales in `dtype`: under autocast the residual stream has another dtype than during the probe."""
        scales, self.dtype = self.scales, dtype
        self._forget_scales()
        for kind, scale in scales.items():
            self.set_scale(kind, scale)

    @property
    def work(self) -> LayerWork:
        """All that a compiled graph of the layer depends on: how attention and FFN are skipped, and whether the FFN is
        measured."""
        attention = self._skipped("attention") if self.skip_attention else None
        return attention, self._skipped("ffn") if self.skip_ffn else None, self.measure_ffn

    def _skipped(self, kind: SublayerKind) -> str:
        scale = self.scales[kind]
        return "affine" if isinstance(scale, Affine) else "plain" if scale == 1.0 else "scaled"

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """The layer without its skipped sublayers. hidden_states: [B, S, D]; the result has the same shape."""
        if self.idle:
            return self.stock(hidden_states, *args, **kwargs)
        if not (self.turn.compiled and torch.compiler.is_compiling()):
            if self.turn.thread != get_ident():
                return self.stock(hidden_states, *args, **kwargs)
            if hidden_states.dtype is not self.dtype:
                self._follow(hidden_states.dtype)
        if args and any(argument is not None for argument in args):
            raise ValueError(
                f"{type(self.layer).__name__} was called with {len(args)} positional arguments after the hidden "
                "states; skipping passes on keyword arguments only"
            )
        entry = hidden_states
        if self.keep_kv:
            self._write_kv(hidden_states, kwargs)
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
        if self.finishes:
            hidden_states = self.structure.finish(self.layer, hidden_states)
        if self.probe is not None:
            self.probe.record("layer", self.index, entry, hidden_states, None)
        return hidden_states

    def _write_kv(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> None:
        """Let the skipped attention write the K/V of its input, [B, S, D], into the cache, and end its call there."""
        given = {name: KVOnly(value) if isinstance(value, Cache) else value for name, value in kwargs.items()}
        try:
            self.structure.attention.change(self.layer, hidden_states, given)
        except KVWritten:
            return
        raise ValueError(f"the attention of layer {self.index} wrote no K/V; keeping them needs the KV cache")

    def _run(self, kind: SublayerKind, hidden_states: Tensor, kwargs: dict[str, Any] | None) -> Tensor:
        sublayer = self.structure.attention if kind == "attention" else self.structure.ffn
        change = sublayer.change(self.layer, hidden_states, kwargs)
        output = hidden_states + change
        if self.probe is not None:
            self.probe.record(kind, self.index, hidden_states, output, change)
        return output


def _compensated(hidden_states: Tensor, delta: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * h + shift, computed as (h + shift) + h * (scale - 1).

    In half precision a scale near 1 itself would lose most of its digits. delta: scale - 1, 0-dim or [D]; None for a
    scale of exactly 1. shift: [D] or None. Paper: Eq. (4), which has no shift.
    """
    shifted = hidden_states if shift is None else hidden_states + shift
    return shifted if delta is None else torch.addcmul(shifted, hidden_states, delta)
