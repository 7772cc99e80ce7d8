"""The windows of consecutive layers whose input and output differ least in angle, in one forward per prompt.

Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887. As there, the angle is
measured at the last token of a text, in units of pi, as a mean over the texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from adaskip.calibration.search import Choice
from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.patching import patches_of
from adaskip.core.plan import KINDS, Sublayer
from adaskip.core.wrappers import unwrapped


class _LastToken:
    """A probe of layers that keeps the residual stream at the last token: before each layer, and after the last."""

    def __init__(self) -> None:
        self.stream: dict[int, Tensor] = {}

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        if kind == "layer":
            self.stream[layer], self.stream[layer + 1] = a[0, -1].cpu(), b[0, -1].cpu()


@torch.no_grad()
def layer_angles(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """The angles between the inputs of the layers, float64 [M + 1, M + 1] in units of pi.

    Entry (i, j) is the mean over the prompts, at the last token; layer M stands for the output of the last layer,
    before the final norm. prompts: token ids, each 1-D.
    """
    model = unwrapped(model)
    patches, angles = patches_of(model), []
    for prompt in prompts:
        probe = _LastToken()
        with patches.install():
            patches.set_probe(probe)
            find_decoder(model)(input_ids=prompt[None].to(execution_device(model)), use_cache=False)
        states = normalize(torch.stack([probe.stream[i] for i in range(len(patches.patches) + 1)]).double(), dim=-1)
        angles.append((states @ states.T).clamp(-1, 1).acos() / math.pi)
    return torch.stack(angles).mean(dim=0)


def windows(angles: Tensor, counts: Sequence[int], found_by: str) -> dict[int, Choice]:
    """For each number of sublayers in `counts` (even), the window of least angle; the first one in a tie.

    Raises ValueError if an angle is not a number, after an overflow in the model.
    """
    if not bool(angles.isfinite().all()):
        raise ValueError(f"{found_by} needs finite hidden states; the full model's overflow on a calibration prompt")
    chosen = {}
    for count in counts:
        size = count // 2
        of_start = angles.diagonal(size).tolist()
        start = min(range(len(of_start)), key=of_start.__getitem__)
        sublayers = frozenset(Sublayer(kind, start + i) for kind in KINDS for i in range(size))
        chosen[count] = Choice(sublayers, of_start[start], found_by)
    return chosen
