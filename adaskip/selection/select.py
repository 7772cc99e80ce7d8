"""Chooses the sets of a model for one phase: calibration, baselines' sets, divergence and search put together."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from torch import Tensor
from transformers import PreTrainedModel

from adaskip.calibration import calibrate
from adaskip.importance import ImportanceProfile
from adaskip.plan import Budget, Phase, SkipPlan, Sublayer
from adaskip.selection.divergence import OutputDivergence
from adaskip.selection.profile import SearchCost, Selected, SelectionProfile
from adaskip.selection.search import Choice, Set, search
from adaskip.strategies import AdaSkip, EarlyExit, SkipDecode, UnifiedSkipping

KINDS = ("attention", "ffn")
CANDIDATES_PER_PLACE = 3
"""The search looks at so many times as many sublayers as the largest set has, the most similar ones."""


def select(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    phase: Phase,
    *,
    up_to: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    model_name: str | None = None,
    dataset: str = "",
    data_ids: Iterable[str] = (),
) -> SelectionProfile:
    """The sets of 1 to `up_to` sublayers of `model` that change its output least in `phase`.

    prompts: token ids, 1-D. Similarity and scales are measured first, by AdaSkip's calibration on the same prompts.
    """
    began = time.perf_counter()
    importance = calibrate(model, prompts, model_name=model_name, dataset=dataset, data_ids=data_ids)
    adaskip_seconds = time.perf_counter() - began
    num_layers = importance.num_layers
    Budget(sublayers=up_to).num_sublayers(num_layers)  # refuses what no plan can hold
    divergence = OutputDivergence(model, prompts, phase, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)
    choices = search(
        lambda chosen, which: divergence(_plan(chosen, importance), which),
        importance.ranking()[: max(CANDIDATES_PER_PLACE * up_to, num_layers)],
        num_layers=num_layers,
        num_prompts=len(prompts),
        up_to=up_to,
        starts=sets_of_others(importance, up_to),
    )
    return SelectionProfile(
        selected={count: _selected(choice, importance) for count, choice in choices.items()},
        phase=phase,
        num_layers=num_layers,
        cost=SearchCost(
            num_forwards=divergence.num_forwards + len(prompts),
            num_tokens=divergence.num_tokens + importance.tokens,
            seconds=divergence.seconds + adaskip_seconds,
            adaskip_forwards=len(prompts),
            adaskip_tokens=importance.tokens,
            adaskip_seconds=adaskip_seconds,
        ),
        model=importance.model,
        weights_fingerprint=importance.weights_fingerprint,
        dtype=importance.dtype,
        attn_implementation=importance.attn_implementation,
        dataset=dataset,
        data_ids=importance.data_ids,
        versions={"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}},
    )


def sets_of_others(importance: ImportanceProfile, up_to: int) -> dict[str, dict[int, Set]]:
    """What AdaSkip and the whole-layer strategies would skip, by strategy and number of sublayers.

    SkipDecode's set is the full one of its last decode step.
    """
    num_layers = importance.num_layers
    sets: dict[str, dict[int, Set]] = {AdaSkip.name: {}}
    for count in range(1, up_to + 1):
        budget = Budget(sublayers=count)
        sets[AdaSkip.name][count] = _set(AdaSkip(num_layers=num_layers, budget=budget, profile=importance).skipped)
        for strategy in (EarlyExit, SkipDecode, UnifiedSkipping):
            if count % 2 == 0 and count // 2 <= num_layers - 2:
                plan = strategy(num_layers=num_layers, budget=budget).skipped
                sets.setdefault(strategy.name, {})[count] = _set(plan)
    return sets


def _set(plan: SkipPlan) -> Set:
    return frozenset({Sublayer("attention", i) for i in plan.attention} | {Sublayer("ffn", i) for i in plan.ffn})


def _plan(chosen: Set, importance: ImportanceProfile) -> SkipPlan:
    return SkipPlan.of_sublayers({sublayer: importance.scale_of(sublayer) for sublayer in chosen})


def _selected(choice: Choice, importance: ImportanceProfile) -> Selected:
    scales: dict[str, dict[int, float]] = {
        kind: {s.layer: importance.scale_of(s) for s in choice.sublayers if s.kind == kind} for kind in KINDS
    }
    return Selected(**scales, divergence=choice.divergence, found_by=choice.found_by)
