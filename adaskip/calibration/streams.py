"""Keeps the hidden states that entered the layers in the last forward over a prompt, so that the next one starts later.

Two plans that differ only from layer L upwards compute the same hidden states below L. So a forward under the second
plan passes over the layers below L and enters layer L with the hidden states of the first. Its result has the same
bits as that of a whole forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from adaskip.core.patching import ModelPatches
from adaskip.core.plan import SkipPlan

KEPT_BYTES = 4 * 2**30
"""Upper bound of the hidden states kept for all prompts of a search; above it, only every k-th layer's are kept."""


def kept_interval(patches: ModelPatches, num_tokens: int) -> int:
    """The least k such that the inputs of every k-th layer, of `num_tokens` tokens, take at most `KEPT_BYTES`."""
    layer = patches.patches[0]
    return max(1, -(-num_tokens * layer.width * layer.dtype.itemsize * len(patches.patches) // KEPT_BYTES))


class KeptStream:
    """The hidden states, [1, T, D], that entered every k-th layer in the last forward over one prompt."""

    def __init__(self, patches: ModelPatches, interval: int = 1):
        self.patches, self.interval = patches, interval
        self.plan: SkipPlan | None = None
        self.entered: dict[int, Tensor] = {}  # by layer

    @contextmanager
    def running(self, plan: SkipPlan, start: int | None = None, *, applied: SkipPlan | None = None) -> Iterator[None]:
        """A context for one forward over the prompt under `plan`, inside `patches.install()`.

        start: the layer that it enters, if not `self.start(plan)`: a lower one whose input is kept, or 0. applied: what
        the layers skip, if that is another plan and `plan` only decides, through the K/V, what they compute.
        """
        start = self.start(plan) if start is None else start
        kept = {layer: states for layer, states in self.entered.items() if layer <= start}
        self.plan, self.entered = None, {}  # a forward that fails leaves nothing to continue from
        entered = dict(kept)
        self.patches.apply(plan if applied is None else applied, passed=start)
        with ExitStack() as hooks:
            for i in range(start, len(self.patches.layers), self.interval):
                hook = _Entry(i, kept.get(i), entered)
                hooks.callback(self.patches.layers[i].register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield
        self.plan, self.entered = plan, entered

    def start(self, plan: SkipPlan) -> int:
        """The highest layer with a kept input below which `plan` is that of the last forward; 0 without one."""
        if self.plan is None:
            return 0
        layers = range(len(self.patches.layers))
        lowest = next((i for i in layers if _differs(i, plan, self.plan)), len(layers))
        return max((layer for layer in self.entered if layer <= lowest), default=0)


class _Entry:
    """A forward pre-hook that records the hidden states entering a layer, or replaces them by the kept ones.

    It does nothing in forwards of other threads than the one that made it.
    """

    def __init__(self, layer: int, kept: Tensor | None, entered: dict[int, Tensor]):
        self.layer, self.kept, self.entered = layer, kept, entered
        self.thread = get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if get_ident() != self.thread:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if self.kept is None:
            self.entered[self.layer] = states
            return None
        kept = self.kept.to(states.device)
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})


def _differs(layer: int, a: SkipPlan, b: SkipPlan) -> bool:
    """Whether two plans differ in what they do in a layer."""
    return any(
        (layer in getattr(a, kind)) != (layer in getattr(b, kind)) or a.scale(kind, layer) != b.scale(kind, layer)
        for kind in ("attention", "ffn")
    )
