"""Executes skip plans on a stock model by replacing the forward of each decoder layer instance.

This module does not depend on any strategy. Plans change between steps, outside compiled code. They apply to the
forward of one thread at a time (`Turn`); forwards of other threads run the stock layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaskip.core import hf
from adaskip.core.blocks import (
    OUTPUT_SCALAR,
    cache_slots,
    decoder_layers,
    find_decoder,
    probe_layers,
)
from adaskip.core.kv_cache import held_scales, release_skipped
from adaskip.core.layer_patch import FOR_GOOD, FORWARDS, LayerPatch, SublayerProbe, Turn, Work
from adaskip.core.plan import EMPTY_PLAN, Affine, Compensation, SkipPlan, Sublayer
from adaskip.core.wrappers import unwrapped

NOTHING: frozenset[int] = frozenset()


class ModelPatches:
    """The layer patches of one model. They outlive a context, so that compiled graphs can be reused.

    slots: for each decoder layer, the index of the KV-cache layer it uses (its `layer_idx`). outlived: whether a
    `generate` of a context that has ended is still running. drafting: whether the model is inside `with lossless(...)`.
    for_good: whether the model never leaves its context.
    """

    def __init__(self, model: nn.Module):
        proved = probe_layers(model)
        self.layers = tuple(decoder_layers(model))
        self.slots = proved.cache_slots
        self.turn = Turn()
        self.patches = tuple(LayerPatch(layer, i, proved, self.turn) for i, layer in enumerate(self.layers))
        self.made_for = _description(self.layers)
        self.installed = self.outlived = self.drafting = self.for_good = False
        self._installing = threading.Lock()
        self._plan: SkipPlan | None = EMPTY_PLAN
        self._measured: frozenset[int] | None = NOTHING
        self._passed = 0
        self.work: Work = tuple(patch.work for patch in self.patches)
        self.in_compiled_step = False

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether the model still has the layers that these patches were made for, unchanged."""
        layers = tuple(decoder_layers(model))
        with self._installing:
            return layers == self.layers and (self.installed or _description(layers) == self.made_for)

    def slots_of(self, layers: Collection[int]) -> frozenset[int]:
        """The cache slots of the decoder layers at these positions."""
        return frozenset(self.slots[i] for i in layers)

    def release(self, cache: Cache, plan: SkipPlan) -> None:
        """Free the K/V in `cache` of the attentions that `plan` skips; see `release_skipped`."""
        release_skipped(cache, self.scales_by_slot(plan), self.slots)

    def scales_by_slot(self, plan: SkipPlan) -> dict[int, Compensation]:
        """Compensation of the attentions that `plan` skips, by the cache slot of their layer."""
        return {self.slots[i]: plan.scale("attention", i) for i in plan.attention}

    def held(self, cache: Cache) -> SkipPlan:
        """A plan that skips the attentions without K/V in `cache`, with their compensation."""
        scales = held_scales(cache)
        return SkipPlan.of_sublayers(
            {Sublayer("attention", i): scales[slot] for i, slot in enumerate(self.slots) if slot in scales}
        )

    def check(self, plan: SkipPlan) -> None:
        """Raise ValueError if this model cannot run `plan`."""
        plan.check_fits(len(self.patches))
        if plan.keeps_kv:
            self.check_writes_kv(sorted(plan.attention))
        for sublayer, scale in plan.scales.items():
            if isinstance(scale, Affine):
                self.patches[sublayer.layer].check_width(scale)

    def check_writes_kv(self, layers: Iterable[int]) -> None:
        """Refuse attentions with work of accelerate after their forward, which ends early where it only writes K/V."""
        for patch in (self.patches[layer] for layer in layers):
            attention = getattr(patch.layer, patch.structure.attention.module)
            for hook in hf.device_hooks(attention):
                if getattr(hook, "offload", True) or getattr(hook, "io_same_device", True):
                    raise ValueError(
                        f"layer {patch.index} cannot keep the K/V of its skipped attention: accelerate's "
                        f"{type(hook).__name__} has work to do after the attention's forward; place the model "
                        "without offloading"
                    )

    def check_in_place(self, decoder: Any) -> None:
        """Raise ValueError if a layer of the current plan, or its forward, was replaced inside the context."""
        for patch, layer in zip(self.patches, decoder.layers, strict=False):
            if not patch.idle and (layer is not patch.layer or not patch.in_place):
                raise ValueError(
                    f"layer {patch.index} ({type(layer).__name__}) or its forward was replaced inside the context; "
                    "change the model outside of it"
                )

    @contextmanager
    def install(self, *, exclusive: bool = True) -> Iterator[ModelPatches]:
        """Install the patches; on exit, also after an exception, every layer is restored exactly.

        exclusive: plans and probes apply to every forward of the calling thread; otherwise the caller sets the turn.
        """
        with self._installing:
            self._check_free()
            if self.drafting and not exclusive:
                raise ValueError("the model is inside `with lossless(...)`; leave it before skipping(...) begins")
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

    def _check_free(self) -> None:
        if self.installed:
            raise ValueError(
                "the model is already inside skipping(...), a lossless generation or a measurement, here or in "
                "another thread; these do not nest"
            )
        if self.outlived:
            raise ValueError("a generate of a skipping(...) context that ended is still running on this model")

    @contextmanager
    def drafts(self) -> Iterator[None]:
        """The context of `with lossless(...)`, in which no other one can begin; ValueError inside another context."""
        with self._installing:
            if self.drafting:
                raise ValueError("the model is already inside `with lossless(...)`; contexts do not nest")
            self._check_free()
            self.drafting = True
        try:
            yield
        finally:
            self.drafting = False

    def stay(self) -> None:
        """From now on, the model is said to skip for good; called inside its context, which nothing then leaves."""
        self.for_good = True
        for patch in self.patches:
            patch.for_good = True

    def apply(self, plan: SkipPlan, measured_ffns: frozenset[int] = NOTHING, *, passed: int = 0) -> None:
        """From the next forward on, skip `plan` and record input and output of the FFNs in `measured_ffns`.

        passed: the layers below this one return their input and write no K/V, whatever the plan.
        """
        if plan is self._plan and measured_ffns is self._measured and passed == self._passed:
            return  # the usual decode step: nothing changes
        self._plan = self._measured = None  # after an interrupt, the next call sets all layers again
        for i, patch in enumerate(self.patches):
            below = i < passed
            patch.set_work(
                skip_attention=below or i in plan.attention,
                keep_kv=plan.keeps_kv and not below,
                skip_ffn=below or i in plan.ffn,
                measure_ffn=i in measured_ffns,
            )
            if patch.skip_attention:
                patch.set_scale("attention", 1.0 if below else plan.scale("attention", i))
            if patch.skip_ffn:
                patch.set_scale("ffn", 1.0 if below else plan.scale("ffn", i))
        self.work = tuple(patch.work for patch in self.patches)
        self._plan, self._measured, self._passed = plan, measured_ffns, passed

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """A context for the call of a compiled graph of the whole step, which may be traced for the current plan."""
        self.in_compiled_step = self.turn.compiled = True
        try:
            yield
        finally:
            self.in_compiled_step = self.turn.compiled = False

    @contextmanager
    def running(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """A context in which each layer runs the given compiled form of its `LayerPatch.forward`."""
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
        """From the next forward on, pass the input and output of every sublayer to `probe`."""
        for patch in self.patches:
            patch.set_probe(probe)

    def take_ffn_io(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return and clear the input and output, [B, S, D], of the FFNs measured in the last forward, by layer."""
        taken = {patch.index: patch.ffn_io for patch in self.patches if patch.ffn_io is not None}
        for patch in self.patches:
            patch.ffn_io = None
        return taken


_PATCHES: WeakKeyDictionary[nn.Module, ModelPatches] = WeakKeyDictionary()
_LOOKUP = threading.RLock()


def _description(layers: Sequence[nn.Module]) -> tuple[Any, ...]:
    """All that the proof of the layers depends on, for comparison: parts, forwards, dtypes and cache slots."""
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
    """The patches of a model, made at first use and kept while the model exists; one thread at a time makes them.

    Raises UnsupportedModelError if its layers cannot be skipped, ValueError if it is in training mode or skips for
    good.
    """
    model = unwrapped(model)
    refuse_for_good(model)
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode; skipping needs inference mode: call model.eval()"
        )
    decoder = find_decoder(model)
    _refuse_compiled_in_place(model, decoder)
    with _LOOKUP:
        known = _PATCHES.get(decoder)
        if known is None or not known.belongs_to(model):
            known = _PATCHES[decoder] = ModelPatches(model)
        return known


def refuse_for_good(model: nn.Module) -> None:
    """Raise ValueError for a model that never leaves its context."""
    known = _PATCHES.get(find_decoder(model))
    if known is not None and known.for_good:
        raise ValueError(
            f"{FOR_GOOD}: skipping(...), a lossless generation or a measurement need a model that they can change; "
            "load the stock model instead"
        )


def _refuse_compiled_in_place(model: nn.Module, decoder: nn.Module) -> None:
    """Refuse `module.compile()`, whose graph ignores later changes of the module."""
    parts = (model, decoder, *decoder_layers(model))
    compiled = [type(part).__name__ for part in parts if hf.is_compiled_in_place(part)]
    if compiled:
        raise ValueError(
            f"{compiled[0]} was compiled in place by .compile(), whose graph would ignore the plan; load the model "
            "again and let generate compile it: cache_implementation='static'"
        )
