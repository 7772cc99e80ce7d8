"""Executes skip plans on a stock model by replacing the forward of each decoder layer instance.

A layer with nothing to skip and nothing to measure calls its stock forward, so an empty plan is the stock model.
Nothing here knows a strategy by name. What a layer has to do changes between steps, outside compiled code; scales
and shifts are tensors that stay where they are and are written in place, so that a new scale is neither a new graph
for `torch.compile` nor a stale address in a captured CUDA graph.

The work of a layer is that of one thread at a time, the one whose turn it is; a forward of any other thread runs the
stock layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NoReturn, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaskip.core import hf
from adaskip.core.blocks import (
    OUTPUT_SCALAR,
    Proved,
    cache_slots,
    decoder_layers,
    execution_device,
    find_decoder,
    forward_attribute,
    probe_layers,
    restore_attribute,
)
from adaskip.core.kv_cache import held_scales, release_skipped
from adaskip.core.plan import EMPTY_PLAN, Affine, Compensation, SkipPlan, Sublayer, SublayerKind
from adaskip.core.wrappers import unwrapped

NOTHING: frozenset[int] = frozenset()
FORWARDS = ("forward", hf.STOCK_FORWARD)
"""Where a layer's computation may hang."""


class SublayerProbe(Protocol):
    """Takes part in a layer's forward to measure it."""

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        """See input `a`, output `b` and, of a sublayer, `change` = b - a, all [B, S, D].

        kind: "attention", "ffn", or "layer" for both together.
        """
        ...


class Turn:
    """Whose forward the patches work for. thread: its identity; None between forwards. compiled: the forward runs a
    compiled graph, whose trace must not ask for the thread."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.compiled = False


class StaysInPlace:
    """Belongs to one model object: a copy or a pickle of the model made meanwhile would stay skipped for ever."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ValueError(
            "the model is inside skipping(...) or a measurement, which belongs to this model object; copy or pickle "
            "the model outside of it (save_pretrained and state_dict work inside, too)"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce_ex__(None)


LayerWork = tuple[str | None, str | None, bool]
Work = tuple[LayerWork, ...]


class LayerPatch(StaysInPlace):
    """What one decoder layer does in the current step."""

    def __init__(self, layer: nn.Module, index: int, proved: Proved, turn: Turn):
        self.layer, self.index, self.structure, self.turn = layer, index, proved.structure, turn
        self.width = proved.stream_width
        self.finishes = hasattr(layer, OUTPUT_SCALAR)
        self.skip_attention = self.skip_ffn = self.measure_ffn = False
        self.idle = True
        self.deltas: dict[SublayerKind, Tensor | None] = {}  # scale - 1, of the kinds in `scales`
        self.shifts: dict[SublayerKind, Tensor | None] = {}
        self.probe: SublayerProbe | None = None
        self.ffn_io: tuple[Tensor, Tensor] | None = None
        self.stock: Any = None
        self.own: Any = None  # the layer's own attribute before, if it had one
        self.bound: Any = None  # what hangs on the layer while installed
        self.name = "forward"
        self.device, self.dtype = execution_device(layer), proved.stream_dtypes[index]  # where scales live
        self._forget_scales()

    def _forget_scales(self) -> None:
        self.scales: dict[SublayerKind, Compensation] = {}
        self.buffers: dict[tuple[str, str], Tensor] = {}  # the storage behind deltas and shifts

    def install(self) -> None:
        """Take over from the stock forward; what was stored for another device is forgotten."""
        if (device := execution_device(self.layer)) != self.device:
            self.device = device
            self._forget_scales()
        self.name = forward_attribute(self.layer)
        self.own = self.layer.__dict__.get(self.name)
        if isinstance(getattr(self.own, "__self__", None), LayerPatch):
            raise ValueError(
                f"layer {self.index} ({type(self.layer).__name__}) is also a layer of another model that is inside "
                "skipping(...), a lossless generation or a measurement; leave that first"
            )
        self.stock = getattr(self.layer, self.name)
        self.layer.__dict__[self.name] = self.bound = self.forward

    def remove(self) -> None:
        """Give the layer back what it had, wherever the patch hangs now; what others put there meanwhile stays."""
        for name in FORWARDS:
            if self.layer.__dict__.get(name) is self.bound and self.bound is not None:
                restore_attribute(self.layer, name, self.own if name == self.name else self.stock)
        self.bound = self.ffn_io = None

    @property
    def in_place(self) -> bool:
        """Whether a call of the layer still comes here, perhaps through accelerate's hook."""
        return any(self.layer.__dict__.get(name) is self.bound for name in FORWARDS)

    def set_work(self, *, skip_attention: bool, skip_ffn: bool, measure_ffn: bool) -> None:
        """What the layer leaves out and keeps for measuring, from the next forward on."""
        self.skip_attention, self.skip_ffn, self.measure_ffn = skip_attention, skip_ffn, measure_ffn
        self._update_idle()

    def set_probe(self, probe: SublayerProbe | None) -> None:
        """Who sees the layer's sublayers, from the next forward on."""
        self.probe = probe
        self._update_idle()

    def _update_idle(self) -> None:
        self.idle = not (self.skip_attention or self.skip_ffn or self.measure_ffn) and self.probe is None

    def set_scale(self, kind: SublayerKind, scale: Compensation) -> None:
        """Compensate a skipped sublayer by `scale`, written in place; the device fills in a factor itself."""
        if scale == self.scales.get(kind):
            return
        self.scales.pop(kind, None)  # should this be interrupted, the next call starts afresh
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
        """Raise ValueError unless there is an entry for each channel of the stream."""
        if len(scale.scale) != self.width:
            raise ValueError(
                f"an affine compensation of layer {self.index} has {len(scale.scale)} channels; the hidden states have "
                f"{self.width}"
            )

    def _buffer(self, kind: SublayerKind, name: str, shape: Sequence[int]) -> Tensor:
        if (kind, name) not in self.buffers:
            with torch.inference_mode(False):  # else it could not be written outside of inference mode
                self.buffers[kind, name] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.buffers[kind, name]

    def _follow(self, dtype: torch.dtype) -> None:
        """The stream has another dtype than when it was probed (autocast): write the scales anew in that one."""
        scales, self.dtype = self.scales, dtype
        self._forget_scales()
        for kind, scale in scales.items():
            self.set_scale(kind, scale)

    @property
    def work(self) -> LayerWork:
        """What a compiled graph of the layer depends on: how attention and FFN are skipped, what is measured."""
        attention = self._skipped("attention") if self.skip_attention else None
        return attention, self._skipped("ffn") if self.skip_ffn else None, self.measure_ffn

    def _skipped(self, kind: SublayerKind) -> str:
        scale = self.scales[kind]
        return "affine" if isinstance(scale, Affine) else "plain" if scale == 1.0 else "scaled"

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """The layer without its skipped sublayers. hidden_states: [B, S, D], as is what is returned."""
        if self.idle:
            return self.stock(hidden_states, *args, **kwargs)
        if not (self.turn.compiled and torch.compiler.is_compiling()):
            if self.turn.thread != get_ident():
                return self.stock(hidden_states, *args, **kwargs)
            if hidden_states.dtype is not self.dtype:
                self._follow(hidden_states.dtype)
        if args and any(argument is not None for argument in args):
            raise ValueError(
                f"{type(self.layer).__name__} was called with {len(args)} further positional arguments; "
                "skipping passes on keyword arguments only"
            )
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
        if self.finishes:
            hidden_states = self.structure.finish(self.layer, hidden_states)
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
    """The layer patches of one model. They outlive a context, so that compiled graphs can be used again.

    slots: the layer of a KV cache that each decoder layer uses, its own `layer_idx`. outlived: a `generate` of a
    context that has ended is still running.
    """

    def __init__(self, model: nn.Module):
        proved = probe_layers(model)
        self.layers = tuple(decoder_layers(model))
        self.slots = proved.cache_slots
        self.turn = Turn()
        self.patches = tuple(LayerPatch(layer, i, proved, self.turn) for i, layer in enumerate(self.layers))
        self.made_for = _description(self.layers)
        self.installed = self.outlived = False
        self._installing = threading.Lock()
        self._plan: SkipPlan | None = EMPTY_PLAN
        self._measured: frozenset[int] | None = NOTHING
        self.work: Work = tuple(patch.work for patch in self.patches)
        self.in_compiled_step = False

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether the model still has the layers these patches were made for, as they were."""
        layers = tuple(decoder_layers(model))
        return layers == self.layers and (self.installed or _description(layers) == self.made_for)

    def slots_of(self, layers: Collection[int]) -> frozenset[int]:
        """The cache slots of decoder layers, by position."""
        return frozenset(self.slots[i] for i in layers)

    def layers_of(self, slots: Collection[int]) -> frozenset[int]:
        """The decoder layers, by position, whose cache slots are in `slots`."""
        return frozenset(i for i, slot in enumerate(self.slots) if slot in slots)

    def release(self, cache: Cache, plan: SkipPlan) -> None:
        """Let `cache` go without K/V of the attention that `plan` skips; see `release_skipped`."""
        release_skipped(cache, {self.slots[i]: plan.scale("attention", i) for i in plan.attention}, self.slots)

    def held(self, cache: Cache) -> SkipPlan:
        """The attention without K/V in `cache`, with what compensates it."""
        scales = held_scales(cache)
        return SkipPlan.of_sublayers(
            {Sublayer("attention", i): scales[slot] for i, slot in enumerate(self.slots) if slot in scales}
        )

    def check(self, plan: SkipPlan) -> None:
        """Raise ValueError for a plan that this model cannot run."""
        plan.check_fits(len(self.patches))
        for sublayer, scale in plan.scales.items():
            if isinstance(scale, Affine):
                self.patches[sublayer.layer].check_width(scale)

    def check_in_place(self, decoder: Any) -> None:
        """Raise ValueError if a layer that the current plan concerns was replaced, or its forward, meanwhile."""
        for patch, layer in zip(self.patches, decoder.layers, strict=False):
            if not patch.idle and (layer is not patch.layer or not patch.in_place):
                raise ValueError(
                    f"layer {patch.index} ({type(layer).__name__}) or its forward was replaced inside the context; "
                    "change the model outside of it"
                )

    @contextmanager
    def install(self, *, exclusive: bool = True) -> Iterator[ModelPatches]:
        """Put the patches in place; on exit, also by an exception, every layer is exactly as before.

        exclusive: plans and probes are for every forward of the calling thread; otherwise the caller sets the turn.
        """
        with self._installing:
            if self.installed:
                raise ValueError(
                    "the model is already inside skipping(...), a lossless generation or a measurement, here or in "
                    "another thread; these do not nest"
                )
            if self.outlived:
                raise ValueError("a generate of a skipping(...) context that ended is still running on this model")
            self.installed = True
        try:
            for patch in self.patches:
                patch.install()
            if exclusive:
                self.turn.thread = get_ident()
            yield self
        finally:
            for patch in self.patches:
                patch.remove()
            self.turn.thread = None
            self.apply(EMPTY_PLAN)
            self.set_probe(None)
            self.installed = False

    def apply(self, plan: SkipPlan, measured_ffns: frozenset[int] = NOTHING) -> None:
        """From the next forward on, skip `plan` and keep input and output of the FFNs in `measured_ffns`."""
        if plan is self._plan and measured_ffns is self._measured:
            return  # the usual decode step: nothing changes
        self._plan = self._measured = None  # should this be interrupted, the next call starts afresh
        for i, patch in enumerate(self.patches):
            patch.set_work(skip_attention=i in plan.attention, skip_ffn=i in plan.ffn, measure_ffn=i in measured_ffns)
            if patch.skip_attention:
                patch.set_scale("attention", plan.scale("attention", i))
            if patch.skip_ffn:
                patch.set_scale("ffn", plan.scale("ffn", i))
        self.work = tuple(patch.work for patch in self.patches)
        self._plan, self._measured = plan, measured_ffns

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """What runs inside is one graph of the whole step, traced if need be for the plan of just now."""
        self.in_compiled_step = self.turn.compiled = True
        try:
            yield
        finally:
            self.in_compiled_step = self.turn.compiled = False

    @contextmanager
    def running(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Every layer runs its compiled form of `LayerPatch.forward` instead of that itself."""
        try:
            self.turn.compiled = True
            for patch, forward in zip(self.patches, forwards, strict=True):
                patch.layer.__dict__[patch.name] = forward
            yield
        finally:
            self.turn.compiled = False
            for patch in self.patches:
                patch.layer.__dict__[patch.name] = patch.bound

    def set_probe(self, probe: SublayerProbe | None) -> None:
        """From the next forward on, show every sublayer's input and output to `probe`."""
        for patch in self.patches:
            patch.set_probe(probe)

    def take_ffn_io(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Input and output, [B, S, D], of the FFNs measured in the last forward; forgets them."""
        taken = {patch.index: patch.ffn_io for patch in self.patches if patch.ffn_io is not None}
        for patch in self.patches:
            patch.ffn_io = None
        return taken


_PATCHES: WeakKeyDictionary[nn.Module, ModelPatches] = WeakKeyDictionary()


def _description(layers: Sequence[nn.Module]) -> tuple[Any, ...]:
    """All that a proof of the layers rests on, to be compared: parts, forwards, dtypes and places in the cache."""
    made_of = (
        (
            *(layer.__dict__.get(name) for name in FORWARDS),
            type(layer).forward,
            tuple(layer.named_children()),
            hasattr(layer, OUTPUT_SCALAR),
            next((p.dtype for p in layer.parameters()), None),
        )
        for layer in layers
    )
    return cache_slots(layers), *made_of


def patches_of(model: nn.Module) -> ModelPatches:
    """The patches of a model, made at first use and kept as long as the model lives.

    Raises UnsupportedModelError if its blocks cannot be skipped, ValueError if it is in training mode.
    """
    model = unwrapped(model)
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; skipping is for inference: call model.eval()")
    decoder = find_decoder(model)
    _refuse_compiled_in_place(model, decoder)
    known = _PATCHES.get(decoder)
    if known is None or not known.belongs_to(model):
        known = _PATCHES[decoder] = ModelPatches(model)
    return known


def _refuse_compiled_in_place(model: nn.Module, decoder: nn.Module) -> None:
    """`module.compile()` keeps a graph that does not see what is changed afterwards."""
    parts = (model, decoder, *decoder_layers(model))
    compiled = [type(part).__name__ for part in parts if hf.is_compiled_in_place(part)]
    if compiled:
        raise ValueError(
            f"{compiled[0]} was compiled in place by .compile(), whose graph would not follow the plan; load the model "
            "anew, and let generate compile: cache_implementation='static'"
        )
