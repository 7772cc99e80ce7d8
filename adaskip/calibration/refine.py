"""Refines the scales of a finished selection: those of a set are adjusted to one another by the output's divergence.

The scale of Eq. (3) comes from the full model, in which no other sublayer of the set is missing. Here all scales of a
set are first moved towards 1; then one after the other, from the last layer down, is raised or lowered by a step. A
change stays if it lowers the mean divergence. A set keeps its scales unless its divergence becomes significantly less.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.search import SCREENING_PROMPTS, significantly_less
from adaskip.core.plan import KINDS, SkipPlan, Sublayer
from adaskip.profiles.selection import SEARCH, Selected, SelectionProfile

REFINED_FROM = "refined_from"
"""The setting that identifies what was refined, and on which prompts."""
SPREADS = (0.85, 0.7)
"""Factors of the difference of all scales from 1."""
STEPS = (0.08, 0.04)
"""Relative changes of a scale; one pass over the set for each."""

Scales = Mapping[Sublayer, float]
MeasureScales = Callable[[Scales, Sequence[int]], list[float]]
"""Returns the divergence of a set with these scales on each of the prompts with the given indices."""


def refine_scales(
    model: PreTrainedModel,
    selection: SelectionProfile,
    prompts: Sequence[Tensor],
    counts: Iterable[int],
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    data_ids: Iterable[str] = (),
    path: Path | None = None,
    show_progress: bool = False,
    weights_fingerprint: str | None = None,
    allow_other_weights: bool = False,
) -> SelectionProfile:
    """`selection` with refined scales in its sets of `counts` sublayers.

    prompts: token ids, each 1-D, as for `select`. data_ids: recorded in the profile, besides those of the selection.
    path: file to which the profile is written after every set; sets that it holds refined are taken from it, so that a
    stopped call continues. show_progress: draw a progress bar if standard error is a terminal. weights_fingerprint:
    that of the model; None to compute it. allow_other_weights: accept, with a warning, a selection of other weights of
    the same architecture.

    Raises:
        ProfileError: the selection was made for another model.
        ValueError: it is not of method search, has no set of these sizes or a refined one, or the file at `path` is a
            refinement of another selection or on other prompts.
    """
    wanted = [*dict.fromkeys(counts)]
    check_refinable(selection, wanted)
    known = {"allow_other_weights": allow_other_weights, "weights_fingerprint": weights_fingerprint}
    selection.check_fits(model, **known)
    refined = replace(
        selection,
        data_ids=tuple(dict.fromkeys([*selection.data_ids, *data_ids])),
        settings={**selection.settings, REFINED_FROM: _digest(selection, prompts)},
    )
    if path is not None and path.exists():
        refined = _continued(path, refined)
    left = [count for count in wanted if _setting(count) not in refined.settings]
    if not left:
        return refined
    ends = {"eos_token_ids": eos_token_ids, "pad_token_id": pad_token_id}
    divergence = OutputDivergence(model, prompts, selection.phase, keep_kv=selection.keep_kv, **ends)
    spent = refined.cost
    for count in tqdm(left, desc="refine", unit="set", disable=None if show_progress else True):
        chosen = selection.selected[count]
        scales, mean = refined_scales(
            lambda scales, which: divergence(SkipPlan.of_sublayers(dict(scales)), which),
            {Sublayer(kind, i): scale for kind in KINDS for i, scale in getattr(chosen, kind).items()},
            len(divergence),
        )
        refined = replace(
            refined,
            selected={**refined.selected, count: _with(chosen, scales, mean)},
            settings={**refined.settings, _setting(count): 1.0},
            cost=replace(
                spent,
                num_forwards=spent.num_forwards + divergence.num_forwards,
                num_tokens=spent.num_tokens + divergence.num_tokens,
                seconds=spent.seconds + divergence.seconds,
            ),
        )
        if path is not None:
            refined.save(path)
    return refined


def check_refinable(selection: SelectionProfile, counts: Iterable[int]) -> None:
    """Raise ValueError for a selection of another method, or without an unrefined set of each of these sizes."""
    if selection.method != SEARCH:
        raise ValueError(f"scales are refined in sets of method {SEARCH}; got a selection of method {selection.method}")
    if missing := [count for count in counts if count not in selection.selected]:
        has = ", ".join(map(str, selection.selected))
        raise ValueError(f"the selection has no set of {missing[0]} sublayers; it has {has}")
    if done := [count for count in counts if _setting(count) in selection.settings]:
        raise ValueError(f"the scales of the selection's set of {done[0]} sublayers are refined already; leave it out")


def refined_scales(measure: MeasureScales, scales: Scales, num_prompts: int) -> tuple[Scales, float]:
    """The scales with the least mean divergence found, and that divergence on all prompts.

    `scales` themselves unless those found diverge significantly less. The change of a single scale is screened on a
    few prompts.
    """
    prompts = range(num_prompts)
    screening, rest = prompts[:SCREENING_PROMPTS], prompts[SCREENING_PROMPTS:]
    first = least = measure(scales, prompts)
    best = dict(scales)
    for spread in SPREADS:
        tried = {sublayer: 1 + spread * (scale - 1) for sublayer, scale in scales.items()}
        values = measure(tried, prompts)
        if sum(values) < sum(least):
            best, least = tried, values
    for step in STEPS:
        for sublayer in sorted(scales, key=lambda s: (-s.layer, s.kind)):  # each shares the layers below it
            for factor in (1 + step, 1 - step):
                tried = {**best, sublayer: best[sublayer] * factor}
                values = measure(tried, screening)
                if sum(values) >= sum(least[: len(values)]):
                    continue
                values = [*values, *(measure(tried, rest) if rest else ())]
                if sum(values) < sum(least):
                    best, least = tried, values
                    break
    return (best, fmean(least)) if significantly_less(least, first) else (scales, fmean(first))


def _with(chosen: Selected, scales: Scales, divergence: float) -> Selected:
    of_kind = {kind: {s.layer: scale for s, scale in scales.items() if s.kind == kind} for kind in KINDS}
    return replace(chosen, **of_kind, divergence=divergence)


def _continued(path: Path, selection: SelectionProfile) -> SelectionProfile:
    """The selection at `path`, which a stopped call has written; ValueError if it is not a refinement of this one."""
    held = SelectionProfile.load(path)
    if _identity(held) != _identity(selection):
        raise ValueError(f"{path} holds a refinement of another selection or on other prompts; give another file")
    return held


def _identity(selection: SelectionProfile) -> tuple[Any, ...]:
    """What a refinement does not change."""
    sets = {count: chosen.plan.sublayers for count, chosen in selection.selected.items()}
    given = selection.settings.get(REFINED_FROM)
    return sets, selection.phase, selection.keep_kv, selection.weights_fingerprint, selection.data_ids, given


def _digest(selection: SelectionProfile, prompts: Sequence[Tensor]) -> float:
    """A number that identifies the original scales and the prompts: 52 bits of a SHA-256, exact in a float."""
    scales = {count: [dict(chosen.attention), dict(chosen.ffn)] for count, chosen in selection.selected.items()}
    told = json.dumps([scales, [torch.as_tensor(prompt).tolist() for prompt in prompts]])
    return float(int(hashlib.sha256(told.encode()).hexdigest()[:13], 16))


def _setting(count: int) -> str:
    """The setting that records that the scales of the set of `count` sublayers were refined."""
    return f"refined_{count}"
