"""Writes measurement folders as `adaskip.studies.observations.measuring` does, so that tests need no models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adaskip.profiles.importance import UNITS
from adaskip.studies.observations.saved import MEASUREMENTS, PROVENANCE
from adaskip.studies.observations.settings import Target

TOKENS = 60


def write_measured(
    out_dir: Path,
    model: str,
    target: Target,
    similarity: Mapping[str, Sequence[float]],
    *,
    num_samples: int = 5,
    noise: float = 0.0,
    tokens: int = TOKENS,
    rest: Sequence[float] | None = None,
    finished: bool = True,
) -> Path:
    """Write one folder and return it.

    Args:
        similarity: by unit, an entry per decoder layer; a unit that is left out has the layer's.
        noise: how far samples differ, evenly spread around `similarity`.
        rest: FFN similarity after every window; in the windows it is `similarity`.
    """
    folder = out_dir / MEASUREMENTS / model / target.folder_name
    folder.mkdir(parents=True)
    units = {unit: np.array(similarity.get(unit, next(iter(similarity.values())))) for unit in UNITS}
    records = []
    for index in range(num_samples):
        shift = noise * (2 * index / max(1, num_samples - 1) - 1)
        measured = {unit: {"similarity": (s + shift).tolist(), "scale": [1.0] * len(s)} for unit, s in units.items()}
        window = {"first": units["ffn"].tolist(), "rest": list(units["ffn"].tolist() if rest is None else rest)}
        windows = {str(size): window for size in (5, 20, 40) if size < tokens}
        about = {"id": f"{target.task}-{index}", "index": index, "prompt_tokens": 100, "tokens": tokens}
        records.append({**about, **measured, "windows": windows if target.phase == "decode" else {}})
    (folder / f"{target.task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = {**dict.fromkeys(PROVENANCE), "num_layers": len(units["layer"]), "samples": num_samples}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "finished": "2026-01-01" if finished else None}))
    return folder
