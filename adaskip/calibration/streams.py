"""Keeps the hidden states that entered the layers in the latest forwards over a prompt, so that the next starts later.

Two plans that differ only from layer L upwards compute the same hidden states below L. So a forward under the second
plan passes over the layers below L and enters layer L with the hidden states of the first. Its result has the same
bits as that of a whole forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from adaskip.core.patching import ModelPatches
from adaskip.core.plan import SkipPlan

KEPT_BYTES, KEPT_BYTES_CPU = 4 * 2**30, 2 * 2**30
"""Upper bounds of the hidden states kept for all prompts of a search, on an accelerator and on the CPU. Where those of
one forward take more, only every k-th layer's are kept."""
KEPT_FORWARDS = 16
"""Upper bound of the forwards over one prompt whose hidden states are kept."""


@dataclass(frozen=True)
class Kept:
    """What is kept of each prompt: the inputs of every `interval`-th layer, at most `states` of them in all."""

    interval: int
    states: int

    @classmethod
    def of(cls, patches: ModelPatches, num_tokens: int) -> Kept:
        """As many states as the bytes allow, and the least interval at which those of one forward fit.

        num_tokens: of all prompts together.
        """
        layer = patches.patches[0]
        kept_bytes = KEPT_BYTES_CPU if layer.device.type == "cpu" else KEPT_BYTES
        states = max(1, kept_bytes // (num_tokens * layer.width * layer.dtype.itemsize))
        return cls(-(-len(patches.patches) // states), states)


class KeptStreams:
    """The hidden states, [1, T, D], that entered layers in the latest forwards over one prompt.

    Forwards that share their lower layers share these states.
    """

    def __init__(self, patches: ModelPatches, kept: Kept):
        self.patches, self.kept = patches, kept
        self.latest: deque[tuple[SkipPlan, dict[int, Tensor]]] = deque()  # states by layer

    @contextmanager
    def running(self, plan: SkipPlan, start: int | None = None, *, applied: SkipPlan | None = None) -> Iterator[None]:
        """A context for one forward over the prompt under `plan`, inside `patches.install()`.

        start: the layer that it enters, if not `self.start(plan)`: a lower one whose input is kept, or 0. applied: what
        the layers skip, if that is another plan and `plan` only decides, through the K/V, what they compute.
        """
        highest, states = self._most_alike(plan)
        start = max(highest, 0) if start is None else start
        kept = {layer: entered for layer, entered in states.items() if layer <= start}
        del states  # those above `start` may be forgotten now
        run = range(start, len(self.patches.layers), self.kept.interval)
        self._make_room(kept, len(run) - (start in kept))
        entered = dict(kept)
        self.patches.apply(plan if applied is None else applied, passed=start)
        with ExitStack() as hooks:
            for i in run:
                hook = _Entry(i, kept.get(i), entered)
                hooks.callback(self.patches.layers[i].register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield
        self.latest.append((plan, entered))  # not of a forward that fails

    def start(self, plan: SkipPlan) -> int:
        """The highest layer with a kept input below which `plan` is that of a kept forward; 0 without one."""
        return max(self._most_alike(plan)[0], 0)

    def _most_alike(self, plan: SkipPlan) -> tuple[int, dict[int, Tensor]]:
        """That layer of the forward for which it is highest, and the forward's states; -1 without any."""
        layers = range(len(self.patches.layers))
        best: tuple[int, dict[int, Tensor]] = -1, {}
        for other, states in self.latest:
            lowest = next((i for i in layers if _differs(i, plan, other)), len(layers))
            best = max(best, (max(layer for layer in states if layer <= lowest), states), key=itemgetter(0))
        return best

    def _make_room(self, kept: dict[int, Tensor], new: int) -> None:
        """Forget the oldest forwards until `new` states fit beside the others and those `kept`."""
        while self.latest:
            held = {id(state) for states in (kept, *(states for _, states in self.latest)) for state in states.values()}
            if len(held) + new <= self.kept.states and len(self.latest) < KEPT_FORWARDS:
                return
            self.latest.popleft()


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
