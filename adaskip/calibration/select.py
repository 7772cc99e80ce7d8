"""`select`: chooses the sets of a model for one phase by calibration and search, or by a method of another paper."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.calibration.divergence import OBJECTIVE_VERSION, OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.calibration.peers import PEERS, Asked, Found, counts_of, settings_of
from adaskip.calibration.progress import Progress, held
from adaskip.calibration.search import Choice, Set, most_measured, search
from adaskip.core.fingerprint import weights_fingerprint as fingerprint_of
from adaskip.core.plan import KINDS, Budget, Phase, SkipPlan, Sublayer, check_phase
from adaskip.core.wrappers import unwrapped
from adaskip.profiles.fields import finite
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SEARCH, SearchCost, Selected, SelectionProfile, check_keeps_kv
from adaskip.strategies import POP, AdaSkip, EarlyExit, SkipDecode, UnifiedSkipping

WHOLE_LAYER_STRATEGIES = (EarlyExit, SkipDecode, UnifiedSkipping)
PROMPT_STRATEGIES = (POP, SkipDecode, UnifiedSkipping)
"""The whole-layer strategies in a search with keep_kv; POP has the sets of Early Exit."""
SAME_AS_CALIBRATION = (
    *("model", "weights_fingerprint", "dtype", "attn_implementation", "hidden_size", "adapter", "config_fingerprint"),
    *("prompts_begin_with_bos", "dataset", "data_ids", "versions"),
)
"""Fields of a selection profile that are copied from the calibration of the same model on the same prompts."""


def select(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    phase: Phase,
    *,
    up_to: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    keep_kv: bool = False,
    method: str = SEARCH,
    budgets: Sequence[int] | None = None,
    settings: Mapping[str, float] | None = None,
    faster: Callable[[SkipPlan], float] | None = None,
    model_name: str | None = None,
    dataset: str = "",
    data_ids: Iterable[str] = (),
    importance: ImportanceProfile | None = None,
    progress_path: Path | None = None,
    show_progress: bool = False,
    weights_fingerprint: str | None = None,
    allow_other_weights: bool = False,
) -> SelectionProfile:
    """Search the sets of 1 to `up_to` sublayers of `model` that change its output least in `phase`.

    prompts: token ids, each 1-D; they should resemble the prompts of the later use. keep_kv: search, in phase prefill,
    sets for strategies with keep_kv=True, which are skipped only while the prompt is read. method: what chooses the
    sets: "search" for strategy `calibrated`, or the name of a strategy of another paper: "cosine_window", "blockpruner"
    or "evopress", which use no scales. budgets: numbers of sublayers to make sets for, with the other papers' methods;
    None for every number up to `up_to` that the method can make. settings: for "evopress", `effort` (share of the
    published number of generations, default 0.1) and `seed` (default 0).
    faster: with method "search", the predicted speedup of a plan, by which ties are decided: of the sets that a step
    compares, the fastest one is chosen whose divergence is not significantly above the least one. AdaSkip's set is kept
    if it is one of these and none of them is faster. Every set that a step compares is then measured on all prompts:
    more forwards, but at most `most_forwards`. `settings` are then any numbers, which record the prediction.
    importance: AdaSkip's profile, which gives a search candidates, scales and AdaSkip's own sets; None to measure it on
    the same prompts. AdaSkip's set, with keep_kv POP's, is kept for every budget for which the search finds no
    significantly better one.
    allow_other_weights: accept, with a warning, an `importance` of other weights of the same architecture.
    progress_path: a file that keeps the measurements; after a stop, the same call continues from it. The file is not
    deleted here: delete it after you have saved the profile.
    show_progress: draw a progress bar if standard error is a terminal. weights_fingerprint: that of the model; None to
    compute it. model_name, dataset, data_ids: recorded in the profile.

    Raises:
        LockedError: another process uses the file at `progress_path`.
        ProfileError: `importance` was measured on another model.
        ValueError: the method cannot make these sets, has no such settings, or does not decide ties by `faster`.
    """
    check_phase(phase)
    if faster is not None and method != SEARCH:
        raise ValueError(f"faster decides ties of method {SEARCH}; got method {method}")
    counts = counts_of(method, up_to, budgets)
    settings = settings_of(method, settings or {}) if faster is None else dict(settings or {})
    for name, value in settings.items():
        finite(f"setting {name}", value)
    if keep_kv:
        check_keeps_kv(phase, method)
    if weights_fingerprint is None:
        weights_fingerprint = fingerprint_of(model)
    if importance is not None:
        importance.check_fits(model, allow_other_weights=allow_other_weights, weights_fingerprint=weights_fingerprint)
    described = {"model_name": model_name, "dataset": dataset, "data_ids": data_ids}
    with held(progress_path):
        began = time.perf_counter()
        measured = calibrate(model, prompts, **described, weights_fingerprint=weights_fingerprint)
        own = Found({}, len(prompts), measured.tokens, time.perf_counter() - began)
        importance = measured if importance is None else importance
        Budget(sublayers=up_to).num_sublayers(importance.num_layers)  # raises if up_to is too large
        identity = _identity(model, measured, importance, prompts, phase, eos_token_ids)
        identity |= {"keep_kv": True} if keep_kv else {}
        ends = (eos_token_ids, pad_token_id)
        asked = Asked(model, prompts, phase, counts, settings, *ends, identity, progress_path, show_progress)
        searched = method == SEARCH
        found = _search(asked, importance, own, keep_kv, faster) if searched else PEERS[method].choose(asked)
    scale_of = importance.scale_of if searched else lambda sublayer: 1.0
    return SelectionProfile(
        selected={count: _selected(choice, scale_of) for count, choice in found.choices.items()},
        phase=phase,
        num_layers=importance.num_layers,
        cost=SearchCost(
            *(found.num_forwards, found.num_tokens, found.seconds), *(own.num_forwards, own.num_tokens, own.seconds)
        ),
        method=method,
        settings=settings,
        keep_kv=keep_kv,
        **{name: getattr(measured, name) for name in SAME_AS_CALIBRATION},
    )


def _search(
    asked: Asked,
    importance: ImportanceProfile,
    own: Found,
    keep_kv: bool,
    faster: Callable[[SkipPlan], float] | None,
) -> Found:
    """The sets of strategy calibrated. own: the cost of AdaSkip's calibration, which is part of the search's."""
    prompts, up_to, num_layers = asked.prompts, max(asked.counts), importance.num_layers
    progress = Progress(
        lambda chosen, prompt: divergence(_plan(chosen, importance), [prompt])[0],
        asked.progress_path,
        asked.identity,
        num_prompts=len(prompts),
    )
    answers = asked.answers(progress)
    divergence = OutputDivergence(asked.model, prompts, asked.phase, answers=answers, keep_kv=keep_kv, **asked.stops)
    lengths = [passage.ids.numel() for passage in divergence.passages]  # tokens that one measurement reads
    answered = sum(map(len, answers))
    setup_forwards, setup_tokens = divergence.num_forwards + len(prompts) + answered, divergence.num_tokens
    setup_seconds = divergence.seconds
    choices = search(
        progress,
        importance.ranking(),
        num_layers=num_layers,
        num_prompts=len(divergence),
        up_to=up_to,
        starts=sets_of_others(importance, up_to, keep_kv=keep_kv),
        default=POP.name if keep_kv else AdaSkip.name,
        faster=None if faster is None else lambda s: faster(replace(_plan(s, importance), keeps_kv=keep_kv)),
        show_progress=asked.show_progress,
    )
    return Found(
        choices,
        num_forwards=own.num_forwards + setup_forwards + len(progress.known),
        num_tokens=2 * own.num_tokens + answered + setup_tokens + sum(lengths[i] for _, i in progress.known),
        seconds=own.seconds + setup_seconds + progress.seconds,
    )


def most_forwards(num_layers: int, num_prompts: int, up_to: int) -> int:
    """Maximum number of forwards on calibration prompts in a search for sets of `up_to` sublayers."""
    whole_layers = len(WHOLE_LAYER_STRATEGIES)
    starts = [1 + (whole_layers if count % 2 == 0 else 0) for count in range(1, up_to + 1)]
    return most_measured(2 * num_layers, num_prompts, starts)


def _identity(
    model: PreTrainedModel,
    measured: ImportanceProfile,
    importance: ImportanceProfile,
    prompts: Sequence[Tensor],
    phase: Phase,
    eos_token_ids: Sequence[int],
) -> dict[str, Any]:
    """All that the divergences of a search depend on. measured: the profile of the model itself."""
    told = str([list(eos_token_ids), *(torch.as_tensor(prompt).tolist() for prompt in prompts)])
    config = {name: value for name, value in unwrapped(model).config.to_dict().items() if not name.startswith("_")}
    return {
        "phase": phase,
        "objective": OBJECTIVE_VERSION,
        "device": model.device.type,
        "versions": dict(measured.versions),
        "weights": measured.weights_fingerprint,
        "adapter": measured.adapter,
        "config": hashlib.sha256(str(sorted(config.items())).encode()).hexdigest(),
        "dtype": measured.dtype,
        "attn_implementation": measured.attn_implementation,
        "prompts": hashlib.sha256(told.encode()).hexdigest(),
        "scales": hashlib.sha256(str((importance.attention, importance.ffn)).encode()).hexdigest(),
    }


def sets_of_others(importance: ImportanceProfile, up_to: int, *, keep_kv: bool = False) -> dict[str, dict[int, Set]]:
    """The sets of AdaSkip and the whole-layer strategies, by strategy and number of sublayers.

    For SkipDecode it is the full set of its last decode step. keep_kv: with POP in place of Early Exit.
    """
    num_layers, whole_layers = importance.num_layers, PROMPT_STRATEGIES if keep_kv else WHOLE_LAYER_STRATEGIES
    sets: dict[str, dict[int, Set]] = {strategy.name: {} for strategy in (AdaSkip, *whole_layers)}
    for count in range(1, up_to + 1):
        budget = Budget(sublayers=count)
        sets[AdaSkip.name][count] = _set(AdaSkip(num_layers=num_layers, budget=budget, profile=importance).skipped)
        for strategy in whole_layers:
            if count % 2 == 0 and count // 2 <= num_layers - 2:
                plan = strategy(num_layers=num_layers, budget=budget, phase="prefill" if keep_kv else "e2e").skipped
                sets[strategy.name][count] = _set(plan)
    return sets


def _set(plan: SkipPlan) -> Set:
    return frozenset({Sublayer("attention", i) for i in plan.attention} | {Sublayer("ffn", i) for i in plan.ffn})


def _plan(chosen: Set, importance: ImportanceProfile) -> SkipPlan:
    return SkipPlan.of_sublayers({sublayer: importance.scale_of(sublayer) for sublayer in chosen})


def _selected(choice: Choice, scale_of: Callable[[Sublayer], float]) -> Selected:
    scales: dict[str, dict[int, float]] = {
        kind: {s.layer: scale_of(s) for s in choice.sublayers if s.kind == kind} for kind in KINDS
    }
    return Selected(**scales, divergence=choice.divergence, found_by=choice.found_by)
