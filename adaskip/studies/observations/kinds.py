"""Observation 2 (Figure 3): within a layer, attention and FFN matter differently."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from adaskip.studies.observations.findings import UNRELATED, Claim, Findings, Table, span
from adaskip.studies.observations.labels import task_label
from adaskip.studies.observations.ranks import chance_correlation, rank_correlation
from adaskip.studies.observations.saved import Measured, Saved
from adaskip.studies.observations.settings import Target

SIGNIFICANT = 0.05


def find(saved: Saved, targets: list[Target]) -> Findings:
    """Test it on sublayer similarity over prompts."""
    panels = [_compare(model, target, saved[model][target]) for model, target in product(saved, targets)]
    return Findings(
        name="ob2",
        title="Observation 2: IO similarity of attention and FFN sublayers (paper: Figure 3)",
        notes=[
            "Mean over the tokens of all prompts: the figure's lines. Its bands: 10th to 90th percentile of samples."
        ],
        claims=[_distributions_differ(panels), _rankings_differ(panels), _attention_higher_at_the_end(panels)],
        table=_table(panels),
        numbers=panels,
        sources={model: {t.folder_name: m.provenance for t, m in parts.items()} for model, parts in saved.items()},
    )


def _compare(model: str, target: Target, measured: Measured) -> dict[str, Any]:
    attention, ffn = measured.profile("attention"), measured.profile("ffn")
    test: Any = ks_2samp(attention, ffn)
    higher = np.flatnonzero(attention > ffn).tolist()
    return {
        "model": model,
        "task": target.task,
        "samples": len(measured.records),
        "attention": attention.round(6).tolist(),
        "ffn": ffn.round(6).tolist(),
        "ks_statistic": float(test.statistic),
        "ks_p": float(test.pvalue),
        "rank_correlation": rank_correlation(attention, ffn),
        "attention_higher_in": higher,
    }


def _distributions_differ(panels: list[dict[str, Any]]) -> Claim:
    values = [panel["ks_p"] for panel in panels]
    evidence = (
        f"Kolmogorov-Smirnov over layers, statistic {span([panel['ks_statistic'] for panel in panels])}, "
        f"p {min(values):.2g} to {max(values):.2g}; counted as different at p < {SIGNIFICANT}."
    )
    text = "The similarities of attention and FFN are distributed differently over the layers"
    return Claim(text, sum(p < SIGNIFICANT for p in values), len(values), evidence)


def _rankings_differ(panels: list[dict[str, Any]]) -> Claim:
    rhos, depth = [panel["rank_correlation"] for panel in panels], len(panels[0]["ffn"])
    evidence = (
        f"Rank correlation {span(rhos)}; counted as different below {UNRELATED}. "
        f"Random rankings of {depth} layers stay below {chance_correlation(depth):.2f} in 95 % of cases."
    )
    return Claim("Attention and FFN rank the layers differently", sum(r < UNRELATED for r in rhos), len(rhos), evidence)


def _attention_higher_at_the_end(panels: list[dict[str, Any]]) -> Claim:
    """In the paper's LLaMA: the last 11 of 32 layers."""
    last = round(len(panels[0]["ffn"]) / 3)
    means = [[float(np.mean(panel[kind][-last:])) for kind in ("attention", "ffn")] for panel in panels]
    shown = "; ".join(
        f"{panel['model']} {attention:.3f} and {ffn:.3f}"
        for panel, (attention, ffn) in zip(panels, means, strict=True)
        if panel["task"] == panels[0]["task"]
    )
    evidence = f"Means of attention and FFN over the last {last} layers, on {task_label(panels[0]['task'])}: {shown}."
    text = "In the last third of the layers attention is the more similar kind"
    return Claim(text, sum(attention > ffn for attention, ffn in means), len(panels), evidence)


def _table(panels: list[dict[str, Any]]) -> Table:
    header = [
        *("Model", "Dataset", "Samples", "Attention mean", "FFN mean", "Rank correlation", "KS statistic", "KS p"),
        "Attention higher in layers",
    ]
    rows = [
        [
            *(panel["model"], task_label(panel["task"]), str(panel["samples"])),
            *(f"{np.mean(panel[kind]):.3f}" for kind in ("attention", "ffn")),
            *(f"{panel['rank_correlation']:.2f}", f"{panel['ks_statistic']:.2f}", f"{panel['ks_p']:.2g}"),
            ", ".join(map(str, panel["attention_higher_in"])) or "none",
        ]
        for panel in panels
    ]
    return Table(header, rows)
