"""Observation 1 (Figure 2): which layers matter differs between models, hardly between datasets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

from adaskip.studies.observations.findings import ALIKE, UNRELATED, Claim, Findings, Table, span
from adaskip.studies.observations.labels import task_label
from adaskip.studies.observations.ranks import chance_correlation, most_similar, rank_correlation
from adaskip.studies.observations.saved import Saved
from adaskip.studies.observations.settings import Target

PEAKS = 5


def find(saved: Saved, targets: list[Target]) -> Findings:
    """Test it on whole-layer similarity over prompts."""
    between = list(_between_models(saved, targets))
    within = list(_between_tasks(saved, targets))
    depth = min(measured.num_layers for parts in saved.values() for measured in parts.values())
    return Findings(
        name="ob1",
        title="Observation 1: IO similarity of whole layers (paper: Figure 2)",
        notes=[
            "Mean over the tokens of all prompts: the figure's lines. Its bands: 10th to 90th percentile of samples."
        ],
        claims=[_models_differ(between, depth), _tasks_agree(within), _peaks(saved, targets)],
        table=_table(saved, targets),
        numbers={"profiles": _profiles(saved, targets), "between_models": between, "between_tasks": within},
        sources={model: {t.folder_name: m.provenance for t, m in parts.items()} for model, parts in saved.items()},
    )


def _between_models(saved: Saved, targets: list[Target]) -> Iterator[dict[str, Any]]:
    """Rank correlation of each two models on each task; models of different depth rank different things."""
    for (one, other), target in product(combinations(saved, 2), targets):
        profiles = [saved[model][target].profile("layer") for model in (one, other)]
        if len(profiles[0]) == len(profiles[1]):
            yield {"models": [one, other], "task": target.task, "rank_correlation": rank_correlation(*profiles)}


def _between_tasks(saved: Saved, targets: list[Target]) -> Iterator[dict[str, Any]]:
    for model, (one, other) in product(saved, combinations(targets, 2)):
        rho = rank_correlation(*(saved[model][target].profile("layer") for target in (one, other)))
        yield {"model": model, "tasks": [one.task, other.task], "rank_correlation": rho}


def _models_differ(between: list[dict[str, Any]], depth: int) -> Claim:
    rhos = [pair["rank_correlation"] for pair in between]
    evidence = (
        f"Rank correlation between models, per pair and task: {span(rhos)}; counted as different below {UNRELATED}. "
        f"Random rankings of {depth} layers stay below {chance_correlation(depth):.2f} in 95 % of cases."
        if rhos
        else "It takes at least two models of the same depth."
    )
    return Claim("Models rank their layers differently", sum(rho < UNRELATED for rho in rhos), len(rhos), evidence)


def _tasks_agree(within: list[dict[str, Any]]) -> Claim:
    rhos = [pair["rank_correlation"] for pair in within]
    evidence = f"Rank correlation between datasets, per model and pair: {span(rhos)}; counted as alike from {ALIKE}."
    return Claim(
        "Within a model the datasets rank the layers alike", sum(rho >= ALIKE for rho in rhos), len(rhos), evidence
    )


def _peaks(saved: Saved, targets: list[Target]) -> Claim:
    """Whether the models' most similar layers are different ones, and which they are."""
    peaks = {model: most_similar(parts[targets[0]].profile("layer"), PEAKS) for model, parts in saved.items()}
    pairs = list(combinations(peaks.values(), 2))
    differing = sum(len(set(one) & set(other)) <= PEAKS // 2 for one, other in pairs)
    listed = "; ".join(f"{model}: {', '.join(map(str, layers))}" for model, layers in peaks.items())
    text = f"Models share at most {PEAKS // 2} of their {PEAKS} most similar layers"
    return Claim(text, differing, len(pairs), f"On {task_label(targets[0].task)}, the most similar first: {listed}.")


def _table(saved: Saved, targets: list[Target]) -> Table:
    rows = []
    for model, target in product(saved, targets):
        measured = saved[model][target]
        profile = measured.profile("layer")
        spread = measured.similarity("layer").std(axis=0).mean()
        low, high = most_similar(-profile, 1)[0], most_similar(profile, 1)[0]
        rows.append(
            [
                *(model, task_label(target.task), str(len(measured.records)), str(measured.tokens.sum())),
                f"{profile.mean():.3f}",
                *(f"{profile[i]:.3f} (layer {i})" for i in (low, high)),
                f"{spread:.4f}",
                ", ".join(map(str, most_similar(profile, PEAKS))),
            ]
        )
    header = [
        "Model",
        "Dataset",
        "Samples",
        "Tokens",
        "Mean",
        "Lowest",
        "Highest",
        "Spread (sd)",
        "Most similar layers",
    ]
    return Table(header, rows)


def _profiles(saved: Saved, targets: list[Target]) -> dict[str, Any]:
    return {
        model: {target.task: parts[target].profile("layer").round(6).tolist() for target in targets}
        for model, parts in saved.items()
    }
