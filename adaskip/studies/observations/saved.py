"""Reads saved measurements as arrays, and compares rankings of layers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr, t

from adaskip.runs.cells import MODELS
from adaskip.runs.folder import RunFolder
from adaskip.studies.observations.settings import Target

MEASUREMENTS = "measurements"
"""Folder of the measurements, in the output folder."""
PROVENANCE = (
    *("checkpoint", "weights_fingerprint", "num_layers", "dtype", "device", "attn_implementation", "testbed"),
    *("benchmark", "samples", "batch_size", "max_new_tokens", "data_fingerprint", "versions"),
)
"""Manifest fields that are saved with every number; older manifests have `testbed`, newer ones `benchmark`."""


class NotMeasuredError(ValueError):
    """There are no saved measurements to draw."""


@dataclass(frozen=True)
class Measured:
    """The samples of a model, task and phase; samples without a token are left out."""

    manifest: dict[str, Any]
    records: tuple[dict[str, Any], ...]

    @cached_property
    def tokens(self) -> np.ndarray:
        """[N], tokens of each sample."""
        return np.array([record["tokens"] for record in self.records])

    @property
    def num_layers(self) -> int:
        return self.manifest["num_layers"]

    def similarity(self, unit: str) -> np.ndarray:
        """[N, M], each sample's mean IO similarity per decoder layer; unit: attention, ffn or layer."""
        rows = [record[unit]["similarity"] for record in self.records]
        return np.array(rows, dtype=np.float64).reshape(len(rows), self.num_layers)

    def profile(self, unit: str) -> np.ndarray:
        """[M], the mean over all tokens. Paper: Eq. (2)."""
        return np.average(self.similarity(unit), axis=0, weights=self.tokens)

    def window(self, size: int, min_rest: int) -> tuple[np.ndarray, np.ndarray]:
        """FFN similarity in the first `size` tokens and in the rest, two [n, M]; the rest has at least `min_rest`."""
        split = [r["windows"][str(size)] for r in self.records if r["tokens"] >= size + min_rest]
        first, rest = (
            np.array([part[name] for part in split], dtype=np.float64).reshape(len(split), self.num_layers)
            for name in ("first", "rest")
        )
        return first, rest


Saved = dict[str, dict[Target, Measured]]
"""By model, in drawing order."""


def load_saved(out_dir: Path, targets: Iterable[Target]) -> Saved:
    """All models with every target finished.

    Raises:
        NotMeasuredError: there is none.
    """
    root, targets = out_dir / MEASUREMENTS, list(dict.fromkeys(targets))
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    saved: Saved = {}
    for name in sorted(names, key=drawing_order):
        found = {target: _read(root / name / target.folder_name, target) for target in targets}
        if all(found.values()):
            saved[name] = {target: measured for target, measured in found.items() if measured}
    if not saved:
        wanted = ", ".join(target.folder_name for target in targets)
        raise NotMeasuredError(f"{root} holds no model with finished measurements of {wanted}; leave out --draw-only")
    return saved


def drawing_order(model: str) -> tuple[int, str]:
    """Sort key: the paper's models in its order, then others by name."""
    return (MODELS.index(model) if model in MODELS else len(MODELS), model)


def _read(folder: Path, target: Target) -> Measured | None:
    """The measurements in a folder; None if missing or unfinished."""
    run_folder = RunFolder(folder)
    manifest = run_folder.read_manifest()
    if manifest is None or not manifest["finished"]:
        return None
    lines = run_folder.records_path(target.task).read_text(encoding="utf-8").splitlines()
    records = tuple(record for line in lines if (record := json.loads(line))["tokens"])
    if not records:
        raise NotMeasuredError(f"{folder}: no answer has a second token, so no decoded token was measured")
    return Measured(manifest, records)


def sources(saved: Saved) -> dict[str, Any]:
    """What the numbers were measured on, by model and target."""
    return {
        model: {
            target.folder_name: {
                **{name: measured.manifest[name] for name in PROVENANCE if name in measured.manifest},
                "samples_with_tokens": len(measured.records),
                "tokens": int(measured.tokens.sum()),
            }
            for target, measured in parts.items()
        }
        for model, parts in saved.items()
    }


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho of two [M]; 0 if one of them is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    result: Any = spearmanr(one, other)
    return float(result.statistic)


def chance_correlation(num_layers: int) -> float:
    """|rho| that 95 % of random rankings of `num_layers` layers stay below; at most 1."""
    freedom = num_layers - 2
    if freedom < 1:
        return 1.0
    bound = float(t.ppf(0.975, freedom))
    return bound / (freedom + bound**2) ** 0.5


def most_similar(similarity: np.ndarray, k: int) -> list[int]:
    """The k layers of highest similarity, the highest first; ties in layer order."""
    return np.argsort(-similarity, kind="stable")[:k].tolist()
