"""Removes attentions and FFNs one by one, each time the one without which the text's perplexity is lowest.

Source: Zhong et al., BlockPruner, arXiv 2406.10594. As there, every remaining sublayer is tried in each step, on all
texts. The texts are the calibration prompts; the mean loss per token is compared, which orders sets as perplexity does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.calibration.search import Choice, MeasureDivergence, Set
from adaskip.calibration.streams import Kept, KeptStreams
from adaskip.core.blocks import execution_device
from adaskip.core.patching import patches_of
from adaskip.core.plan import SkipPlan, Sublayer, every_sublayer
from adaskip.core.wrappers import unwrapped

ROWS_PER_CHUNK = 512
"""Logits of this many tokens are converted to float32 at once."""


class TextLoss:
    """Mean negative log-likelihood of a prompt's own tokens, in nats per token, under a plan.

    A measurement runs only the layers from which its plan differs from one of those measured last on the same prompt.
    prompts: token ids, 1-D, each of at least two tokens.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor]):
        if short := [number for number, prompt in enumerate(prompts) if len(prompt) < 2]:
            raise ValueError(f"a text needs at least 2 tokens for a perplexity; prompt {short[0]} has fewer")
        self.model = unwrapped(model)
        self.ids = [prompt[None].to(execution_device(self.model)) for prompt in prompts]
        self._patches = patches_of(self.model)
        kept = Kept.of(self._patches, sum(map(len, prompts)))
        self._streams = [KeptStreams(self._patches, kept) for _ in prompts]

    @torch.no_grad()
    def __call__(self, plan: SkipPlan, number: int) -> float:
        """The loss on the prompt with index `number`; infinite after an overflow."""
        ids, model = self.ids[number], self.model
        with self._patches.install(), self._streams[number].running(plan):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        targets = ids[0, 1:].to(logits.device)
        pairs = zip(logits.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True)
        total = torch.stack([cross_entropy(rows.float(), wanted, reduction="sum") for rows, wanted in pairs]).sum()
        return float(torch.nan_to_num(total / len(targets), nan=torch.inf, posinf=torch.inf))


def prune(
    measure: MeasureDivergence,
    lengths: Sequence[int],
    *,
    num_layers: int,
    up_to: int,
    found_by: str,
    show_progress: bool = False,
) -> dict[int, Choice]:
    """The sets of 1 to `up_to` sublayers, each with one more than the one before.

    measure: the loss of a set on prompts. lengths: their numbers of predicted tokens, which weight the mean. One
    attention always stays. In a tie, the sublayer that is computed first is removed. Raises ValueError if every set of
    a size makes the loss overflow.
    """
    every = [*every_sublayer(num_layers)]
    prompts, removed, choices = range(len(lengths)), frozenset[Sublayer](), {}

    def loss(chosen: Set) -> float:
        losses = measure(chosen, prompts)
        return sum(x * tokens for x, tokens in zip(losses, lengths, strict=True)) / sum(lengths)

    for count in tqdm(range(1, up_to + 1), desc=found_by, unit="set", disable=None if show_progress else True):
        live = num_layers - sum(sublayer.kind == "attention" for sublayer in removed)
        free = [s for s in every if s not in removed and (s.kind == "ffn" or live > 1)]
        downwards = sorted(free, key=lambda s: -s.layer)  # each shares the layers below with those before
        losses = {s: loss(removed | {s}) for s in downwards}
        best = min(free, key=losses.__getitem__)
        if not isfinite(losses[best]):
            raise ValueError(f"no set of {count} sublayers leaves the loss finite on every calibration prompt")
        removed |= {best}
        choices[count] = Choice(removed, losses[best], found_by)
    return choices


def most_measured(num_layers: int, num_prompts: int, up_to: int) -> int:
    """Number of measurements (one set on one prompt) of `prune`; fewer once only one attention is left."""
    return num_prompts * sum(2 * num_layers - removed for removed in range(up_to))
