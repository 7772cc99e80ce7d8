"""`adaskip show SELECTION --prompt-tokens N ...`: the Pareto sets of a selection for each prompt length.

A set is on the Pareto front of a length if no other set of the selection is at least as good in divergence and in
predicted speedup, and better in one. The model's shape comes from its configuration; no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from adaskip.models.loading import check_positions, placement
from adaskip.models.source import ModelSource, named_source
from adaskip.profiles.selection import METHODS, SelectionProfile
from adaskip.roofline import ModelShape
from adaskip.runs.choose_by_speedup import Predictor, Request
from adaskip.runs.job import find_profile

NEW_TOKENS = 128
"""Default length of the answers."""


def pareto_front(points: Mapping[int, tuple[float, float]]) -> set[int]:
    """The keys of the points (divergence, speedup) on the front. The full model, as fast as itself, diverges least, so
    a speedup of at most 1 is on no front."""
    return {
        key
        for key, p in points.items()
        if p[1] > 1 and not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points.values())
    }


def pareto_lines(
    name: str,
    lengths: tuple[int, ...],
    *,
    new_tokens: int | None = None,
    on: str | None = None,
    model: str | None = None,
) -> list[str]:
    """A line for each set of the selection `name` that is on the front of a length, with its predicted speedups.

    on: a device by its data sheet; None for this machine's, whose ceilings are measured. model: what `--model` says.

    Raises:
        ValueError: it is not a selection, its model is not found, or a request is longer than the model's positions.
    """
    profile = SelectionProfile.load(find_profile(name, SelectionProfile, "the selection"))
    if profile.phase == "prefill" and new_tokens is not None:
        raise ValueError(f"--new-tokens is for selections of phases decode and e2e; {name} is for phase prefill")
    new_tokens = 1 if profile.phase == "prefill" else new_tokens or NEW_TOKENS
    config = _source(profile, model).config
    for length in lengths:
        check_positions(config, length, new_tokens, f"--prompt-tokens {length}")
    dtype = placement("cpu", profile.dtype, None)["dtype"]
    predictor = Predictor.on(
        *(on, torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype, profile.attn_implementation),
        shape=ModelShape.of(config),
        phase=profile.phase,
        requests=[Request(lengths[0], new_tokens)],
    )
    plans = {n: replace(chosen.plan, keeps_kv=profile.keep_kv) for n, chosen in profile.selected.items()}
    speedups: dict[int, dict[int, float]] = {}
    for length in lengths:
        at_length = replace(predictor, requests=[Request(length, new_tokens)])
        speedups[length] = {n: at_length.speedup(plan) for n, plan in plans.items()}
    answers = "" if profile.phase == "prefill" else f", answers of {new_tokens} tokens"
    return [
        f"{profile.model}, phase {profile.phase}{answers}: speedup predicted on {predictor.ceilings.name} by prompt "
        "length; * on the Pareto front of the length",
        *_rows(profile, speedups),
    ]


def _rows(profile: SelectionProfile, speedups: Mapping[int, Mapping[int, float]]) -> list[str]:
    """A heading, and a line for each set on a front. speedups: by prompt length and number of sublayers."""
    divergences = {n: chosen.divergence for n, chosen in profile.selected.items()}
    fronts = {length: pareto_front({n: (divergences[n], x[n]) for n in x}) for length, x in speedups.items()}
    if not any(fronts.values()):
        return ["no set is predicted to be faster than the full model"]
    texts = {n: METHODS[profile.method].criterion.format(value) for n, value in divergences.items()}
    width = max(map(len, texts.values()))
    rows = [f"sublayers  {'divergence':{width}}" + "".join(f"  {length:8} " for length in speedups)]
    for n in sorted(set[int]().union(*fronts.values())):
        cells = (f"  {x[n]:8.3f}{'*' if n in fronts[length] else ' '}" for length, x in speedups.items())
        rows.append(f"{n:9}  {texts[n]:{width}}" + "".join(cells))
    return [row.rstrip() for row in rows]


def _source(profile: SelectionProfile, model: str | None) -> ModelSource:
    """The model of a selection; ValueError if it is not found, or has another depth or width."""
    name = model or profile.model
    try:
        source = named_source(name)
        config = source.config.get_text_config()
    except ValueError as error:
        raise ValueError(f"the shape of {name} is unknown: {error}; --model takes the model of the selection") from None
    if config.num_hidden_layers != profile.num_layers or profile.hidden_size not in (None, config.hidden_size):
        raise ValueError(
            f"the selection is for {profile.model} with {profile.num_layers} layers of width {profile.hidden_size}, "
            f"but {name} has {config.num_hidden_layers} of {config.hidden_size}; --model takes its model"
        )
    return source
