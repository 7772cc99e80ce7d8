"""What the ablation keeps: of every model and variant, each sample's quality and what was skipped, in one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaskip.common.files import write_text_atomic
from adaskip.studies.ablation.settings import Variant

SAMPLES_FILE = "online_ablation_samples.json"


@dataclass(frozen=True)
class SampleResult:
    """One sample under one variant.

    quality: score, or negative loss: more is better. skipped: sublayers, mean over the decode steps. added: FFNs that
    joined online. tpot_ms: None where it was not measured.
    """

    id: str
    quality: float
    skipped: float
    added: int
    tpot_ms: float | None


@dataclass(frozen=True)
class Subject:
    """One model. measure: `score` or `loss`. sources: what the numbers were measured on."""

    name: str
    measure: str
    sources: dict[str, Any]
    samples: dict[Variant, list[SampleResult]]

    def as_dict(self) -> dict[str, Any]:
        results = [
            {**asdict(variant), "samples": [list(asdict(sample).values()) for sample in samples]}
            for variant, samples in self.samples.items()
        ]
        return {"measure": self.measure, "sources": self.sources, "variants": results}

    @classmethod
    def from_dict(cls, name: str, content: dict[str, Any]) -> Subject:
        samples = {
            Variant(each["sublayers"], each["window"], each["quantile"]): [SampleResult(*x) for x in each["samples"]]
            for each in content["variants"]
        }
        return cls(name, content["measure"], content["sources"], samples)


def mean_skipped(sublayers: int, window: int, added: int, steps: int) -> float:
    """Sublayers skipped per decode step: the offline set from the first, what was learnt behind the window."""
    return sublayers + (added * max(0, steps - window) / steps if steps else 0.0)


def keep(out_dir: Path, subjects: list[Subject]) -> Path:
    """Put these models' results into the file, in place of what it holds of them."""
    path = out_dir / SAMPLES_FILE
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content = {**held, **{subject.name: subject.as_dict() for subject in subjects}}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each, allow_nan=False)}" for name, each in content.items())
    return write_text_atomic(path, f"{{\n{lines}\n}}\n")


def load(out_dir: Path) -> list[Subject]:
    """Everything kept. Raises ValueError if nothing is."""
    path = out_dir / SAMPLES_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; leave out --draw-only")
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Subject.from_dict(name, each) for name, each in content.items()]
