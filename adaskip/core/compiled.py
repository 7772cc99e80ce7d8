"""Compiled decode steps: a graph of the whole step for each of a few sets of sublayers, and graphs of layers beyond.

`generate` compiles the forward of a model whose cache is static. What is skipped is part of such a graph, so every
set needs its own: one for Early Exit, Unified Skipping and a fixed plan, n for SkipDecode, for AdaSkip one while its
window measures and one after it, plus one for each set of FFNs learnt online. The last are as many as requests
can think of, so they are bounded: the first `MAX_STEP_GRAPHS` sets of a model get a graph of the whole step, which
costs the host one launch per token (a captured CUDA graph in the default mode). Every further set runs layer
by layer through graphs of single layers. A layer has four ways to run (each sublayer skipped or not) and two more in
which its FFN is measured, so their number is bounded whatever the sets are. They cost the host some launches per
layer instead of one per token, but compiling a whole step takes longer than most answers, and that for a set that may
never come again.

Scales, batches and prompts do not enter into it; a new context finds the graphs of the last one. Each graph is
compiled from a code object of its own, since `torch.compile` counts recompilations, and gives up after eight, per code
object.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import CompileConfig

from adaskip.core import hf
from adaskip.core.patching import ModelPatches, Work

MAX_STEP_GRAPHS = 8
StepKind = Literal["prefill", "decode"]


class CompiledSteps:
    """The compiled forwards of one model under one `CompileConfig`; they do not keep the model alive."""

    def __init__(self, config: CompileConfig):
        self.config = config
        self.steps: dict[tuple[StepKind, Work], Callable[..., Any]] = {}
        self.layers: tuple[Callable[..., Any], ...] = ()

    def run(
        self, patches: ModelPatches, kind: StepKind, model: nn.Module, inputs: dict[str, Any], max_step_graphs: int
    ) -> Any:
        """One forward of `model` with the plan its patches were given. kind: chunks of a prompt have shapes apart."""
        key = kind, patches.work
        step = self.steps.get(key)
        if step is None and len(self.steps) < max_step_graphs:
            _pin_scales(patches)
            step = self.steps[key] = torch.compile(_with_own_code(_step), **self.config.to_dict())
        if step is not None:
            with patches.compiling():
                return step(model, inputs)
        if not self.layers:  # without CUDA graphs, which would copy the inputs of each layer
            options = {**self.config.to_dict(), "mode": None}
            methods = (MethodType(_with_own_code(type(patch).forward), patch) for patch in patches.patches)
            self.layers = tuple(torch.compile(method, **options) for method in methods)
        with patches.running(self.layers):
            return model(**inputs)


def _pin_scales(patches: ModelPatches) -> None:
    """Tell the compiler that scales stay where they are, so that a captured graph reads them in place."""
    for patch in patches.patches:
        for buffer in patch.buffers.values():
            hf.keep_address(buffer)


def _step(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**inputs)


def _with_own_code(function: Callable[..., Any]) -> Any:
    """The same function, with a code object, and so a cache of compiled graphs, of its own."""
    assert isinstance(function, FunctionType)
    assert function.__closure__ is None
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_COMPILED: WeakKeyDictionary[ModelPatches, CompiledSteps] = WeakKeyDictionary()


def compiled_steps(patches: ModelPatches, config: CompileConfig | None) -> CompiledSteps:
    """The compiled steps of a model, kept as long as its patches and until another `config` is asked for."""
    config = config or CompileConfig()
    known = _COMPILED.get(patches)
    if known is None or known.config != config:
        known = _COMPILED[patches] = CompiledSteps(config)
    return known
