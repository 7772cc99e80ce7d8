"""Compiled decode steps: one graph per set of skipped sublayers for the first few sets, then graphs of single layers.

`generate` compiles the forward of a model if its cache is static. The set of skipped sublayers is part of such a
graph, so every set needs its own graph: one for Early Exit, Unified Skipping and a fixed plan, n for SkipDecode, and
for AdaSkip one during its window, one after it, and one for each set of FFNs learnt online. Requests can produce any
number of such sets, so the number of graphs is limited. The first `MAX_STEP_GRAPHS` sets of a model get a graph of the
whole step, which costs the host one launch per token (a captured CUDA graph in the default mode). All later sets run
layer by layer through graphs of single layers. A layer can run in four ways (each sublayer skipped or not) and in two
more while its FFN is measured, so the number of layer graphs does not depend on the sets. They cost the host a few
launches per layer instead of one per token. But compiling a whole step takes longer than most answers, and a set may
never occur again.

Graphs do not depend on scales, batches or prompts, and a new context reuses the graphs of the previous one. Each graph
is compiled from its own code object, because `torch.compile` counts recompilations per code object and gives up after
eight.
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
from adaskip.core.layer_patch import Work
from adaskip.core.patching import ModelPatches

MAX_STEP_GRAPHS = 8
StepKind = Literal["prefill", "decode"]


class CompiledSteps:
    """The compiled forwards of one model under one `CompileConfig`; holds no reference to the model."""

    def __init__(self, config: CompileConfig):
        self.config = config
        self.steps: dict[tuple[StepKind, Work], Callable[..., Any]] = {}
        self.layers: tuple[Callable[..., Any], ...] = ()

    def run(
        self, patches: ModelPatches, kind: StepKind, model: nn.Module, inputs: dict[str, Any], max_step_graphs: int
    ) -> Any:
        """Run one forward of `model` under the plan that its patches were given.

        kind: prompt chunks and decode steps get separate graphs, since their shapes differ.
        """
        key = kind, patches.work
        step = self.steps.get(key)
        if step is None and len(self.steps) < max_step_graphs:
            for buffer in (buffer for patch in patches.patches for buffer in patch.buffers.values()):
                hf.keep_address(buffer)  # so that a captured graph reads the scales in place
            step = self.steps[key] = torch.compile(_with_own_code(_step), **self.config.to_dict())
        if step is not None:
            with patches.compiling():
                return step(model, inputs)
        if not self.layers:  # no CUDA graphs here: they would copy the inputs of each layer
            options = {**self.config.to_dict(), "mode": None}
            methods = (MethodType(_with_own_code(type(patch).forward), patch) for patch in patches.patches)
            self.layers = tuple(torch.compile(method, **options) for method in methods)
        with patches.running(self.layers):
            return model(**inputs)


def _step(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**inputs)


def _with_own_code(function: Callable[..., Any]) -> Any:
    """A copy of the function with its own code object, and therefore its own cache of compiled graphs."""
    assert isinstance(function, FunctionType)
    assert function.__closure__ is None
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_COMPILED: WeakKeyDictionary[ModelPatches, CompiledSteps] = WeakKeyDictionary()


def compiled_steps(patches: ModelPatches, config: CompileConfig | None) -> CompiledSteps:
    """The compiled steps of a model. They are kept as long as its patches, or until another `config` is requested."""
    config = config or CompileConfig()
    known = _COMPILED.get(patches)
    if known is None or known.config != config:
        known = _COMPILED[patches] = CompiledSteps(config)
    return known
