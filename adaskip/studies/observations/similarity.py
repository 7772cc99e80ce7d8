"""Observations 1 to 3 (Figures 2 to 4): IO similarity of layers and sublayers over models, datasets and phases."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
from pandas import DataFrame
from scipy.stats import ks_2samp

from adaskip.studies.observations.saved import (
    Saved,
    chance_correlation,
    most_similar,
    rank_correlation,
    sources,
)
from adaskip.studies.observations.settings import KINDS, Target
from adaskip.studies.study import Claim, Findings, span

UNRELATED = 0.5
"""Rankings with a lower correlation count as different; random ones of 16 layers exceed it in 5 % of cases."""
ALIKE = 0.7
"""Rankings with at least this correlation count as alike."""
PEAKS = 5
SIGNIFICANT = 0.05
NOTE = "Mean over the tokens of all prompts: the figure's lines. Its bands: 10th to 90th percentile of samples."
PHASES_NOTE = (
    "Mean over the tokens of all prompts, and over all tokens of the answers after the first one (greedy, full "
    "model): the figure's lines. Its bands: 10th to 90th percentile of samples."
)


def find_layers(saved: Saved, targets: list[Target]) -> Findings:
    """Observation 1: important layers differ between models, hardly between datasets.

    Models of different depth are not compared.
    """
    profiles = {(model, t.task): saved[model][t].profile("layer") for model, t in product(saved, targets)}
    between, within = [], []
    for (one, other), target in product(combinations(saved, 2), targets):
        pair = profiles[one, target.task], profiles[other, target.task]
        if len(pair[0]) == len(pair[1]):
            rho = rank_correlation(*pair)
            between.append({"models": [one, other], "task": target.task, "rank_correlation": rho})
    for model, (one, other) in product(saved, combinations(targets, 2)):
        rho = rank_correlation(profiles[model, one.task], profiles[model, other.task])
        within.append({"model": model, "tasks": [one.task, other.task], "rank_correlation": rho})
    rounded = {m: {t.task: profiles[m, t.task].round(6).tolist() for t in targets} for m in saved}
    return Findings(
        name="ob1",
        title="Observation 1: IO similarity of whole layers (paper: Figure 2)",
        notes=[NOTE],
        claims=_layer_claims(saved, targets, between, within),
        table=DataFrame([_layer_row(saved, model, target) for model, target in product(saved, targets)]),
        numbers={"profiles": rounded, "between_models": between, "between_tasks": within},
        sources=sources(saved),
    )


def _layer_claims(saved: Saved, targets: list[Target], between: list[dict], within: list[dict]) -> list[Claim]:
    rhos = [pair["rank_correlation"] for pair in between]
    depth = min(measured.num_layers for parts in saved.values() for measured in parts.values())
    told = (
        f"Rank correlation between models, per pair and task: {span(rhos)}; counted as different below {UNRELATED}. "
        f"{_chance(depth)}"
        if rhos
        else "It takes at least two models of the same depth."
    )
    differ = Claim("Models rank their layers differently", sum(rho < UNRELATED for rho in rhos), len(rhos), told)
    rhos = [pair["rank_correlation"] for pair in within]
    told = f"Rank correlation between datasets, per model and pair: {span(rhos)}; counted as alike from {ALIKE}."
    text = "Within a model the datasets rank the layers alike"
    agree = Claim(text, sum(rho >= ALIKE for rho in rhos), len(rhos), told)
    peaks = {model: most_similar(parts[targets[0]].profile("layer"), PEAKS) for model, parts in saved.items()}
    pairs = list(combinations(peaks.values(), 2))
    apart = sum(len(set(one) & set(other)) <= PEAKS // 2 for one, other in pairs)
    listed = "; ".join(f"{model}: {', '.join(map(str, layers))}" for model, layers in peaks.items())
    text = f"Models share at most {PEAKS // 2} of their {PEAKS} most similar layers"
    told = f"On {targets[0].label}, the most similar first: {listed}."
    return [differ, agree, Claim(text, apart, len(pairs), told)]


def _layer_row(saved: Saved, model: str, target: Target) -> dict[str, str]:
    measured = saved[model][target]
    profile = measured.profile("layer")
    low, high = most_similar(-profile, 1)[0], most_similar(profile, 1)[0]
    return {
        "Model": model,
        "Dataset": target.label,
        "Samples": str(len(measured.records)),
        "Tokens": str(measured.tokens.sum()),
        "Mean": f"{profile.mean():.3f}",
        "Lowest": f"{profile[low]:.3f} (layer {low})",
        "Highest": f"{profile[high]:.3f} (layer {high})",
        "Spread (sd)": f"{measured.similarity('layer').std(axis=0).mean():.4f}",
        "Most similar layers": ", ".join(map(str, most_similar(profile, PEAKS))),
    }


def _chance(depth: int) -> str:
    return f"Random rankings of {depth} layers stay below {chance_correlation(depth):.2f} in 95 % of cases."


def find_kinds(saved: Saved, targets: list[Target]) -> Findings:
    """Observation 2: the attention and the FFN of a layer differ in importance."""
    panels, rows = [], []
    for model, target in product(saved, targets):
        attention, ffn = (saved[model][target].profile(kind) for kind in KINDS)
        test: Any = ks_2samp(attention, ffn)
        panel = {
            "model": model,
            "task": target.task,
            "samples": len(saved[model][target].records),
            "attention": attention.round(6).tolist(),
            "ffn": ffn.round(6).tolist(),
            "ks_statistic": float(test.statistic),
            "ks_p": float(test.pvalue),
            "rank_correlation": rank_correlation(attention, ffn),
            "attention_higher_in": np.flatnonzero(attention > ffn).tolist(),
        }
        panels.append(panel)
        rows.append(
            {
                "Model": model,
                "Dataset": target.label,
                "Samples": str(panel["samples"]),
                "Attention mean": f"{np.mean(panel['attention']):.3f}",
                "FFN mean": f"{np.mean(panel['ffn']):.3f}",
                "Rank correlation": f"{panel['rank_correlation']:.2f}",
                "KS statistic": f"{panel['ks_statistic']:.2f}",
                "KS p": f"{panel['ks_p']:.2g}",
                "Attention higher in layers": ", ".join(map(str, panel["attention_higher_in"])) or "none",
            }
        )
    return Findings(
        name="ob2",
        title="Observation 2: IO similarity of attention and FFN sublayers (paper: Figure 3)",
        notes=[NOTE],
        claims=_kind_claims(panels, targets[0]),
        table=DataFrame(rows),
        numbers=panels,
        sources=sources(saved),
    )


def _kind_claims(panels: list[dict[str, Any]], first: Target) -> list[Claim]:
    """The last claim: in the paper's LLaMA, attention is the more similar kind in the last 11 of 32 layers."""
    p, rhos, ks = ([panel[name] for panel in panels] for name in ("ks_p", "rank_correlation", "ks_statistic"))
    depths = dict.fromkeys(len(panel["ffn"]) for panel in panels)
    shapes = (
        f"Kolmogorov-Smirnov over layers, statistic {span(ks)}, p {min(p):.2g} to {max(p):.2g}; counted as different "
        f"at p < {SIGNIFICANT}."
    )
    ranks = f"Rank correlation {span(rhos)}; counted as different below {UNRELATED}. {_chance(min(depths))}"
    means = [[float(np.mean(panel[kind][-round(len(panel["ffn"]) / 3) :])) for kind in KINDS] for panel in panels]
    shown = "; ".join(
        f"{panel['model']} {attention:.3f} and {ffn:.3f}"
        for panel, (attention, ffn) in zip(panels, means, strict=True)
        if panel["task"] == first.task
    )
    last = " or ".join(str(round(depth / 3)) for depth in depths)
    thirds = f"Means of attention and FFN over the last {last} layers, on {first.label}: {shown}."
    return [
        Claim(
            "The similarities of attention and FFN are distributed differently over the layers",
            *(sum(x < SIGNIFICANT for x in p), len(p), shapes),
        ),
        Claim("Attention and FFN rank the layers differently", sum(r < UNRELATED for r in rhos), len(rhos), ranks),
        Claim(
            "In the last third of the layers attention is the more similar kind",
            *(sum(attention > ffn for attention, ffn in means), len(panels), thirds),
        ),
    ]


def find_phases(saved: Saved, targets: list[Target]) -> Findings:
    """Observation 3: decoding ranks the sublayers as the prompt does, and its FFNs are more similar."""
    panels, rows = [], []
    tasks = dict.fromkeys(target.task for target in targets)
    for model, task, kind in product(saved, tasks, KINDS):
        prefill, decode = (saved[model][Target(task, phase)] for phase in ("prefill", "decode"))
        before, after = prefill.profile(kind), decode.profile(kind)
        panel = {
            "model": model,
            "task": task,
            "kind": kind,
            "samples": len(decode.records),
            "decoded_tokens": int(decode.tokens.sum()),
            "prefill": before.round(6).tolist(),
            "decode": after.round(6).tolist(),
            "rank_correlation": rank_correlation(before, after),
            "higher_in_decode": np.flatnonzero(after > before).tolist(),
            "median_difference": float(np.median(after - before)),
        }
        panels.append(panel)
        rows.append(
            {
                "Model": model,
                "Dataset": Target(task, "decode").label,
                "Kind": KINDS[kind],
                "Samples": str(panel["samples"]),
                "Decoded tokens": str(panel["decoded_tokens"]),
                "Prefill mean": f"{np.mean(panel['prefill']):.3f}",
                "Decode mean": f"{np.mean(panel['decode']):.3f}",
                "Rank correlation": f"{panel['rank_correlation']:.2f}",
                "Layers higher in decode": f"{len(panel['higher_in_decode'])} of {len(panel['decode'])}",
            }
        )
    return Findings(
        name="ob3",
        title="Observation 3: IO similarity in prefill and in decode (paper: Figure 4)",
        notes=[PHASES_NOTE],
        claims=[claim(panels, kind) for claim in (_phases_agree, _higher_in_decode) for kind in KINDS],
        table=DataFrame(rows),
        numbers=panels,
        sources=sources(saved),
    )


def _phases_agree(panels: list[dict[str, Any]], kind: str) -> Claim:
    rhos = [panel["rank_correlation"] for panel in panels if panel["kind"] == kind]
    evidence = f"Rank correlation {span(rhos)}; counted as alike from {ALIKE}."
    text = f"{KINDS[kind]}: prefill and decode rank the layers alike"
    return Claim(text, sum(rho >= ALIKE for rho in rhos), len(rhos), evidence)


def _higher_in_decode(panels: list[dict[str, Any]], kind: str) -> Claim:
    """In the paper this holds for the FFN of every layer; about attention it says nothing."""
    chosen = [panel for panel in panels if panel["kind"] == kind]
    shares = [len(panel["higher_in_decode"]) / len(panel["decode"]) for panel in chosen]
    gaps = [panel["median_difference"] for panel in chosen]
    evidence = (
        f"Share of layers higher in decode {span(shares)}; decode less prefill, median layer, "
        f"{np.mean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})."
    )
    text = f"{KINDS[kind]}: more similar in decode in most layers"
    return Claim(text, sum(share > 0.5 for share in shares), len(chosen), evidence)
