"""Observation 3 (Figure 4): decoding ranks the sublayers as the prompt does, and its FFNs are more similar."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from adaskip.studies.observations.findings import ALIKE, Claim, Findings, Table, span
from adaskip.studies.observations.labels import KINDS, task_label
from adaskip.studies.observations.ranks import rank_correlation
from adaskip.studies.observations.saved import Measured, Saved
from adaskip.studies.observations.settings import Target


def find(saved: Saved, targets: list[Target]) -> Findings:
    """Test it on the prompts of each task and the answers to them."""
    tasks = list(dict.fromkeys(target.task for target in targets))
    panels = [
        _compare(model, task, kind, *(parts[Target(task, phase)] for phase in ("prefill", "decode")))
        for (model, parts), task, kind in product(saved.items(), tasks, KINDS)
    ]
    return Findings(
        name="ob3",
        title="Observation 3: IO similarity in prefill and in decode (paper: Figure 4)",
        notes=[
            "Mean over the tokens of all prompts, and over all tokens of the answers after the first one (greedy, full "
            "model): the figure's lines. Its bands: 10th to 90th percentile of samples."
        ],
        claims=[*(_phases_agree(panels, kind) for kind in KINDS), *(_higher_in_decode(panels, kind) for kind in KINDS)],
        table=_table(panels),
        numbers=panels,
        sources={model: {t.folder_name: m.provenance for t, m in parts.items()} for model, parts in saved.items()},
    )


def _compare(model: str, task: str, kind: str, prefill: Measured, decode: Measured) -> dict[str, Any]:
    before, after = prefill.profile(kind), decode.profile(kind)
    return {
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


def _phases_agree(panels: list[dict[str, Any]], kind: str) -> Claim:
    rhos = [panel["rank_correlation"] for panel in panels if panel["kind"] == kind]
    evidence = f"Rank correlation {span(rhos)}; counted as alike from {ALIKE}."
    text = f"{KINDS[kind]}: prefill and decode rank the layers alike"
    return Claim(text, sum(rho >= ALIKE for rho in rhos), len(rhos), evidence)


def _higher_in_decode(panels: list[dict[str, Any]], kind: str) -> Claim:
    """In the paper's models it is so for the FFN of every layer; for attention the paper says nothing."""
    chosen = [panel for panel in panels if panel["kind"] == kind]
    holding = sum(2 * len(panel["higher_in_decode"]) > len(panel["decode"]) for panel in chosen)
    shares = [len(panel["higher_in_decode"]) / len(panel["decode"]) for panel in chosen]
    differences = [panel["median_difference"] for panel in chosen]
    evidence = (
        f"Share of layers higher in decode {span(shares)}; decode less prefill, median layer, {_signed(differences)}."
    )
    return Claim(f"{KINDS[kind]}: more similar in decode in most layers", holding, len(chosen), evidence)


def _signed(values: list[float]) -> str:
    return f"{np.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


def _table(panels: list[dict[str, Any]]) -> Table:
    header = [
        *("Model", "Dataset", "Kind", "Samples", "Decoded tokens", "Prefill mean", "Decode mean", "Rank correlation"),
        "Layers higher in decode",
    ]
    rows = [
        [
            *(panel["model"], task_label(panel["task"]), KINDS[panel["kind"]]),
            *(str(panel["samples"]), str(panel["decoded_tokens"])),
            *(f"{np.mean(panel[phase]):.3f}" for phase in ("prefill", "decode")),
            f"{panel['rank_correlation']:.2f}",
            f"{len(panel['higher_in_decode'])} of {len(panel['decode'])}",
        ]
        for panel in panels
    ]
    return Table(header, rows)
